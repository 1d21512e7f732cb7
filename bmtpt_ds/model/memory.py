"""How a rank spends its free memory: tokens of a micro-batch; activations that are kept, or recomputed.

`model.activation_checkpointing: auto` keeps a step's activations, or recomputes them in the backward pass. That costs
another forward pass, about half of a step more, and lets a micro-batch hold several times as many rows. Where the
weights are resident, smaller micro-batches cost little. Under ZeRO-3 each gathers all weights twice, which takes as
long as some thousands of tokens' passes, whatever the model's size: both grow with its parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from bmtpt_ds.model.footprint import weight_bytes
from bmtpt_ds.model_folder import Architecture

# share of the free memory that a micro-batch's activations may take: the allocator's fragments need the rest
_MEMORY_SHARE = 0.5
# parameters, DeepSpeed's defaults
_MAX_LIVE = _MAX_REUSE_DISTANCE = 10**9
_PREFETCH_BUCKET_SIZE = 5 * 10**7

# About where reading bfloat16 weights at 100 GB/s, twice, takes as long as forward and backward pass at 200 TFLOP/s:
# 2 * 2 bytes / 1e11 against 4 FLOP * tokens / 2e14, both a parameter. An estimate, not measured.
_GATHER_TOKENS = 2048


@dataclass(frozen=True)
class Share:
    """What a rank computes in a step, at most."""

    rows: int  # rows times prompts
    row_tokens: int  # of the longest, prompt and target included
    micro_batch: int | None = None  # tokens that the recipe allows at once, if it says so

    @property
    def rows_at_once(self) -> int:
        return self.rows if self.micro_batch is None else min(self.rows, max(1, self.micro_batch // self.row_tokens))


class Choice(NamedTuple):
    """Whether activations are recomputed, and why, for a person."""

    recompute: bool
    why: str

    def __str__(self) -> str:
        return f"activations {'recomputed' if self.recompute else 'kept'}: {self.why}"


class Live(NamedTuple):
    """How much of a T5's blocks ZeRO-3 has whole at a time, in parameters of their matrices."""

    blocks: int  # of all of them, at most, but always the one at work
    ahead: int  # as long as fewer are gathered before their turn, another block is
    reuse: int  # that wait for their backward pass after the forward pass

    def kept(self, sizes: Sequence[int]) -> int:
        """How many of the last blocks wait for their backward pass.

        Args:
            sizes: of all blocks, in the order of a forward pass.
        """
        totals = accumulate(reversed(sizes))
        return sum(total <= min(self.reuse, self.blocks) for total in totals)


def live_blocks(architecture: Architecture, zero: Mapping[str, Any]) -> Live:
    """What the JSON leaves to the blocks beside the embeddings.

    Args:
        zero: the resolved DeepSpeed JSON's `zero_optimization`.
    """
    live = zero.get("stage3_max_live_parameters", _MAX_LIVE) - architecture.embedding_parameters
    return Live(
        blocks=max(0, live),
        ahead=zero.get("stage3_prefetch_bucket_size", _PREFETCH_BUCKET_SIZE),
        reuse=zero.get("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE),
    )


def gathered_bytes(architecture: Architecture, bytes_per_value: int, zero: Mapping[str, Any]) -> int:
    """What ZeRO-3 on several ranks holds whole at a step's fullest moment, at most.

    Args:
        zero: the resolved DeepSpeed JSON's `zero_optimization`.
    """
    live = zero.get("stage3_max_live_parameters", _MAX_LIVE)
    return min(live * bytes_per_value, weight_bytes(architecture, bytes_per_value))


def activation_memory(free: int, gathered: int) -> int:
    """Bytes that a micro-batch's activations may take of those that are free between steps."""
    return max(0, int(_MEMORY_SHARE * (free - gathered)))


def token_budget(memory: int, row_bytes: int, length: int, target_tokens: int) -> int:
    """Tokens of a micro-batch that `memory` holds; at least the longest row's.

    Args:
        row_bytes: what the longest row keeps until its backward pass.
        length: its encoder tokens, prompt included.
        target_tokens: of the longest target.
    """
    return max(length, memory * (length + target_tokens) // row_bytes)


def choose(share: Share, *, row_bytes: int, memory: int, gathered: bool) -> Choice:
    """Recompute only if the share does not fit at once otherwise, and what fits is too little to work with.

    Too little is less than one row, or where weights are gathered less than the tokens whose passes take as long as
    that.

    Args:
        row_bytes: what the longest row keeps if nothing is recomputed.
        memory: bytes for activations, the same on all ranks.
        gathered: whether each micro-batch gathers the weights (ZeRO-3 on several ranks).
    """
    fits, wanted = memory // row_bytes, share.rows_at_once
    if fits >= wanted:
        return Choice(False, f"a micro-batch of {wanted} rows fits")
    least = -(-_GATHER_TOKENS // share.row_tokens) if gathered else 1
    short = f"{fits} of {wanted} rows fit at once"
    if fits >= min(least, wanted):
        return Choice(False, f"{short}, enough for a micro-batch")
    return Choice(True, f"{short} otherwise{', too few for a gather of the weights' if gathered and fits else ''}")
