"""`bmtpt report`: what finished runs have scored, as tables and pictures. No torch: it works on a login node.

`runs` reads folders of runs, `groups` says which of them differ in the seed alone, `paper` holds the paper's figures,
`statistics` the means and intervals, `tables` and `summary` put them side by side, `grids` and `formats` write them,
`plots` draws pictures of source stages (`source_plots`) and of scores (`score_plots`) from `series`, `report` is the
command.
"""
