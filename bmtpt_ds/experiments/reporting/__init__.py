"""`bmtpt report`: what finished runs have scored, as tables and pictures. No torch: it works on a login node.

`runs` reads folders of runs, `groups` says which of them differ in the seed alone, `paper` holds the paper's figures,
`statistics` the means and intervals, `tables` puts them side by side, `formats` writes them, `series` and `plots` draw
what changes over steps, shots and models, `report` is the command.
"""
