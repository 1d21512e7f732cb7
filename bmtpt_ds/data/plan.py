"""The micro-batch plan: which cells a rank computes, in which order, so that every rank makes as many passes.

Under ZeRO-3 a rank that makes one pass more than the others waits for ever, so all ranks compute the same plan from the
same cells, without communication. How the cells are split changes only the rounding of the step's gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Cell:
    """One row seen through one prompt: the unit of work of a step."""

    prompt: int  # which particle (source stage)
    row: int  # which of the step's rows
    weight: float  # of its loss in the step's loss
    source_tokens: int  # encoder tokens, prompt included
    target_tokens: int

    @property
    def tokens(self) -> int:
        return self.source_tokens + self.target_tokens


MicroBatch = list[Cell]


def plan_micro_batches(cells: Sequence[Cell], ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """Deals cells to ranks and cuts each rank's share into micro-batches.

    Args:
        cells: all cells of the step, at least one.
        ranks: data ranks.
        max_tokens: padded tokens that a micro-batch may have; one with a single cell may have more.

    Returns:
        plan[rank][i], the i-th micro-batch of a rank. Every rank has the same number of them and none is empty: where a
        rank has too few cells, a copy of weight 0 fills in.
    """
    if not cells:
        raise ValueError("a step without cells")
    order = sorted(range(len(cells)), key=lambda i: (-cells[i].tokens, i))
    shares = [[cells[i] for i in order[rank::ranks]] for rank in range(ranks)]
    count = max(_fewest(share, max_tokens) for share in shares)
    filler = replace(cells[order[-1]], weight=0.0)
    return [[batch or [filler] for batch in _cut(share, count)] for share in shares]


def padded_tokens(batch: MicroBatch) -> int:
    """Tokens that a micro-batch computes, padding included."""
    return len(batch) * (max(c.source_tokens for c in batch) + max(c.target_tokens for c in batch))


def _cut(share: list[Cell], count: int) -> list[MicroBatch]:
    """`count` runs of neighbours, nearly equal in number of cells; the share is sorted, so neighbours pad little."""
    return [[share[i] for i in part] for part in np.array_split(np.arange(len(share)), count)]


def _fewest(share: list[Cell], max_tokens: int) -> int:
    """The least number of micro-batches with which none is over `max_tokens`."""
    for count in range(1, len(share)):
        if all(len(batch) == 1 or padded_tokens(batch) <= max_tokens for batch in _cut(share, count)):
            return count
    return max(1, len(share))
