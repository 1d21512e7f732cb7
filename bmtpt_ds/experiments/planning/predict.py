"""What a step of the source stage takes of a cluster's memory and time.

The step is dealt to the ranks as a run deals it (`data.plan`, `parallel.Grid`), in micro-batches as large as a run
makes them (`memory`). Under ZeRO-3 all ranks make the same passes, so a pass takes what the slowest rank needs. A pass
gathers every block twice, there and back, and embedding and head once; the last blocks are still there on the way
back.

Symbols: M particles, L prompt length, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from bmtpt_ds.config import deepspeed_json
from bmtpt_ds.data.plan import Cell, MicroBatch, Plan, plan_blocks
from bmtpt_ds.experiments.planning.cluster import Cluster
from bmtpt_ds.experiments.planning.job import FLOAT32, Job
from bmtpt_ds.experiments.planning.memory import Memory, offloads, room, with_activations
from bmtpt_ds.experiments.wire import all_gather_seconds, all_reduce_seconds, broadcast_seconds
from bmtpt_ds.model.flops import row_flops
from bmtpt_ds.model.memory import live_blocks
from bmtpt_ds.model_folder import Architecture
from bmtpt_ds.stage_inputs import particle_ranks


@dataclass(frozen=True)
class Prediction:
    """Of a step, on average over rows."""

    layout: str  # the DeepSpeed JSON
    ranks: int
    nodes: int
    memory: Memory
    recomputed: bool  # activations
    passes: int
    compute: float  # seconds of the passes
    gathering: float  # of weights; on GPUs beside the passes
    traffic: float  # of gradients and particles
    svgd: float
    step: float


def predict(job: Job, cluster: Cluster, layout: str) -> Prediction:
    """A step on all ranks of a cluster, laid out as the DeepSpeed JSON of that name or path says.

    Raises:
        UserError: a JSON, or blocks of particles, that the recipe or the cluster does not go with.
    """
    zero = _zero(job, cluster, layout)
    held, tokens, recomputed = room(job, cluster, zero)
    blocks = particle_ranks(job.recipe.source, cluster.ranks)
    plans = [_plan(step, cluster.ranks // blocks, tokens) for step in job.steps_in(blocks)]
    gathering = _gather_seconds(job, cluster, zero)
    times = [_passes(job, cluster, plan, gathering, recomputed=recomputed) for plan in plans]
    compute, together = (fmean(part) for part in zip(*times, strict=True))
    passes = fmean(len(plan[0]) for plan in plans)
    traffic, svgd = _traffic_seconds(job, cluster, blocks), job.numbers * cluster.svgd
    return Prediction(
        layout=layout,
        ranks=cluster.ranks,
        nodes=cluster.nodes,
        memory=with_activations(job, held, plans, recomputed=recomputed),
        recomputed=recomputed,
        passes=round(passes),
        compute=compute,
        gathering=gathering * passes,
        traffic=traffic,
        svgd=svgd,
        step=together + traffic + svgd,
    )


def _plan(step: Sequence[Sequence[Cell]], data_ranks: int, tokens: int) -> Plan:
    """Of all ranks that have cells, block after block: more than there are cells have none, whatever their number."""
    busy = min(data_ranks, max(map(len, step)))
    return [of_rank for plan in plan_blocks(step, busy, tokens) for of_rank in plan]


def _zero(job: Job, cluster: Cluster, layout: str) -> Mapping[str, Any]:
    """The resolved `zero_optimization`."""
    ds = deepspeed_json.load(layout)
    deepspeed_json.check(ds, dtype=job.recipe.model.dtype, source=layout)
    resolved = deepspeed_json.resolve(
        ds,
        architecture=job.architecture,
        dtype=job.recipe.model.dtype,
        micro_batch=-(-job.cells // cluster.ranks),
        world=cluster.ranks,
        local_world=cluster.gpus,
    )
    return resolved["zero_optimization"]


def _traffic_seconds(job: Job, cluster: Cluster, blocks: int) -> float:
    """Gradients over the ranks of a block, then over the blocks; rank 0's particles to all."""
    link, size, ranks = cluster.link, job.numbers * FLOAT32, cluster.ranks // blocks
    within = cluster.inside if cluster.gpus % ranks == 0 else link  # a block's ranks are neighbours
    seconds = all_reduce_seconds(size / blocks, ranks, within.bytes_per_second, within.latency)
    seconds += all_gather_seconds(size, blocks, link.bytes_per_second, link.latency)
    return seconds + broadcast_seconds(size, cluster.ranks, link.bytes_per_second, link.latency)


def gathered_in_a_pass(architecture: Architecture, value_bytes: int, zero: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of weights that a pass gathers on the way there and on the way back.

    The decoder's last blocks may wait for their backward pass; norms and position biases are on every rank.
    """
    a = architecture
    blocks = a.block_sizes
    kept = live_blocks(a, zero).kept(blocks)
    there = a.embedding_parameters + sum(blocks)
    return there * value_bytes, sum(blocks[: len(blocks) - kept]) * value_bytes


def _gather_seconds(job: Job, cluster: Cluster, zero: Mapping[str, Any]) -> float:
    """Seconds in which a pass gathers the weights, there and back."""
    if zero["stage"] != 3 or (cluster.ranks == 1 and not offloads(zero)):
        return 0.0
    ranks, blocks = cluster.ranks, job.architecture.encoder_blocks + job.architecture.decoder_blocks
    there, back = gathered_in_a_pass(job.architecture, job.value_bytes, zero)
    seconds = (there + back) * cluster.assembly
    if ranks > 1:
        nearby = zero.get("zero_hpz_partition_size", 1)
        link, back_link = cluster.link, cluster.inside if nearby > 1 else cluster.link
        seconds += all_gather_seconds(there, ranks, link.bytes_per_second, blocks * link.latency)
        seconds += all_gather_seconds(
            back, nearby if nearby > 1 else ranks, back_link.bytes_per_second, blocks * back_link.latency
        )
    if offloads(zero):
        seconds += (there + back) / ranks / cluster.host.bytes_per_second + 2 * blocks * cluster.host.latency
    return seconds


def _passes(job: Job, cluster: Cluster, plan: Plan, gathering: float, *, recomputed: bool) -> tuple[float, float]:
    """Seconds of a step's passes without and with the gathering of weights."""
    blocks = job.architecture.encoder_blocks + job.architecture.decoder_blocks
    launch = blocks * cluster.launch
    compute = together = 0.0
    for batches in zip(*plan, strict=True):  # one of each rank, all at once
        work = max(_flops(job, batch, recomputed=recomputed, on_cpu=cluster.on_cpu) for batch in batches)
        seconds = work / cluster.flops
        own = max(seconds, launch) if cluster.overlaps else seconds + launch
        compute += own
        together += max(own, gathering) if cluster.overlaps else own + gathering
    return compute, together


def _flops(job: Job, batch: MicroBatch, *, recomputed: bool, on_cpu: bool) -> int:
    return sum(_row_flops(job.architecture, c.source_tokens, c.target_tokens, recomputed, on_cpu) for c in batch)


@cache  # thousands of ranks have the same few rows
def _row_flops(architecture: Architecture, source: int, target: int, recomputed: bool, on_cpu: bool) -> int:
    return row_flops(architecture, source, target, checkpointing=recomputed, on_cpu=on_cpu).total
