"""`bmtpt profile`: where the time of a step goes, what it takes of memory, devices and links.

`bench` loads, `stages` measures, `profile` puts a model's figures together, `report` shows them. The figures also say
what `bmtpt plan` needs: how fast the passes are, and what a pass costs however small it is.
"""
