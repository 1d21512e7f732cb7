"""`bmtpt plan`: what a run will need, before it is started. No torch: it works on a laptop for a cluster.

`cluster` says what the machines can do, `predict` what a step takes of them, `plan` compares layouts and sizes of a
cluster, `report` shows that.
"""
