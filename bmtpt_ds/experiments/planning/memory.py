"""What a rank holds, as the run will lay it out, and how large its micro-batches become."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bmtpt_ds.data.plan import Cell, Plan, padded_tokens
from bmtpt_ds.experiments.planning.cluster import Cluster
from bmtpt_ds.experiments.planning.job import FLOAT32, Job
from bmtpt_ds.experiments.typical_rows import longest_row
from bmtpt_ds.model.footprint import kept_bytes, weight_bytes
from bmtpt_ds.model.memory import Share, activation_memory, choose, gathered_bytes, token_budget

_CONTEXT = 600 * 10**6  # bytes that CUDA, its libraries and communicators take of a GPU


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    of_all: int  # what there is
    context: int
    weights: int
    gathered: int  # weights of others, at a step's fullest moment
    particles: int
    activations: int = 0  # of the largest micro-batch, as the run will make it
    logits: int = 0  # likewise
    share_kept: int = 0  # activations of a rank's whole share of a step in one pass, none recomputed
    share_recomputed: int = 0  # the same, recomputed

    @property
    def needed(self) -> int:
        return self.context + self.weights + self.gathered + self.particles + self.activations + self.logits

    @property
    def fits(self) -> bool:
        return self.needed <= self.of_all


class Room(NamedTuple):
    """What is left for activations decides how a step is cut."""

    held: Memory
    tokens: int  # of a micro-batch
    recomputed: bool


def offloads(zero: Mapping[str, Any]) -> bool:
    """Whether shards lie in the host's memory."""
    return zero.get("offload_param", {}).get("device", "none") != "none"


def room(job: Job, cluster: Cluster, zero: Mapping[str, Any]) -> Room:
    """
    Args:
        zero: the resolved DeepSpeed JSON's `zero_optimization`.
    """
    held, model = _held(job, cluster, zero), job.recipe.model
    free = held.of_all - held.context - held.weights - held.particles
    memory = activation_memory(free, held.gathered)
    longest, asked = longest_row(job.recipe, job.tasks), job.recipe.run.max_tokens_per_micro_batch
    source, target = job.recipe.prompt.length + longest.source, longest.target
    recomputed = model.activation_checkpointing
    if recomputed == "auto":
        share = Share(-(-job.cells // cluster.ranks), source + target, None if asked == "auto" else int(asked))
        of_row = sum(_row_bytes(job, source, target, recomputed=False))
        recomputed = choose(share, row_bytes=of_row, memory=memory, gathered=held.gathered > 0).recompute
    of_row = sum(_row_bytes(job, source, target, recomputed=recomputed))
    tokens = token_budget(memory, of_row, source, target) if asked == "auto" else int(asked)
    return Room(held, tokens, recomputed)


def _held(job: Job, cluster: Cluster, zero: Mapping[str, Any]) -> Memory:
    """All but activations."""
    a, size = job.architecture, job.value_bytes
    whole = held = weight_bytes(a, size)
    gathered = 0
    if zero["stage"] == 3:
        nearby = zero.get("zero_hpz_partition_size", 1)
        held = 0 if offloads(zero) else -(-whole // cluster.ranks) + (whole // nearby if nearby > 1 else 0)
        if cluster.ranks > 1 or offloads(zero):
            gathered = gathered_bytes(a, size, zero)
    return Memory(
        of_all=int(cluster.memory),
        context=0 if cluster.on_cpu else _CONTEXT,
        weights=held,
        gathered=gathered,
        particles=5 * job.numbers * FLOAT32,  # with their gradients, two moments, and what a collective copies
    )


def with_activations(job: Job, held: Memory, plans: Sequence[Plan], *, recomputed: bool) -> Memory:
    """The same with the activations of the sampled steps' fullest micro-batch and share."""
    batches = [batch for plan in plans for of_rank in plan for batch in of_rank]
    shares = [[cell for batch in of_rank for cell in batch if cell.weight] for plan in plans for of_rank in plan]
    largest, share = max(batches, key=padded_tokens), max(shares, key=lambda cells: sum(c.tokens for c in cells))
    activations, logits = _bytes_of(job, largest, recomputed=recomputed)
    return replace(
        held,
        activations=activations,
        logits=logits,
        share_kept=_bytes_of(job, share, recomputed=False)[0],
        share_recomputed=_bytes_of(job, share, recomputed=True)[0],
    )


def _bytes_of(job: Job, cells: Iterable[Cell], *, recomputed: bool) -> tuple[int, int]:
    rows = [_row_bytes(job, c.source_tokens, c.target_tokens, recomputed=recomputed) for c in cells]
    return sum(kept for kept, _ in rows), sum(logits for _, logits in rows)


def _row_bytes(job: Job, source: int, target: int, *, recomputed: bool) -> tuple[int, int]:
    """What a row keeps until its backward pass, and its logits."""
    kept = kept_bytes(
        job.architecture,
        bytes_per_value=job.value_bytes,
        checkpointing=recomputed,
        source_tokens=source,
        target_tokens=target,
    )
    return kept, target * job.architecture.vocab_size * (job.value_bytes + FLOAT32)
