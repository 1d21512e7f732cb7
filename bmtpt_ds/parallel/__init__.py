"""The ranks of a job and the backbone that is sharded over them; with `runlog.py` all that imports deepspeed.

One path serves every situation: a process without a launcher is a world of one, made without rendezvous; stage 0 keeps
the backbone resident, stage 3 shards it.
"""

from bmtpt_ds.parallel.grid import Grid
from bmtpt_ds.parallel.pulse import node_name
from bmtpt_ds.parallel.ranks import Ranks
from bmtpt_ds.parallel.sharding import Sharded, load_backbone, random_backbone

__all__ = ["Grid", "Ranks", "Sharded", "load_backbone", "node_name", "random_backbone"]
