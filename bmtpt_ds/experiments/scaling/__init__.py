"""`bmtpt scale`: a grid of models, variants, seeds and target tasks, each member an ordinary run.

`jobs` says which commands the grid needs, `schedule` runs them, `table` reads what came out, `scale` is all of it. No
torch here: every member is a process of its own.
"""
