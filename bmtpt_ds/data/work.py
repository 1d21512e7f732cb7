"""A step's work on the host: its rows dealt to ranks and passes, packed or padded. Nothing here touches a device.

It follows from the step's rows alone, so that it can be made while a device is busy with the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bmtpt_ds.data.plan import Cell, MicroBatch, bucket_tokens, buckets, imbalance, plan_blocks
from bmtpt_ds.data.table import Packing, Table, table_of
from bmtpt_ds.data.tokens import HostBatches, TokenRow, collate


@dataclass(frozen=True)
class StepRows:
    """What a step reads, the same on all ranks."""

    rows: Sequence[TokenRow]
    weights: Sequence[float]  # of each row's loss in the loss of a prompt that reads it
    prompt_of: Sequence[int] | None = None  # which prompt reads each row; None: every prompt reads every row

    @classmethod
    def evenly(cls, rows: Sequence[TokenRow], prompt_of: Sequence[int] | None = None) -> "StepRows":
        """Each row weighs as much as the others, all of them together 1."""
        return cls(rows, [1 / len(rows)] * len(rows), prompt_of)

    @classmethod
    def of_prompts(cls, rows: Sequence[Sequence[TokenRow]]) -> "StepRows":
        """Each prompt reads rows of its own, which weigh the same and together 1."""
        weights = [1 / len(own) for own in rows for _ in own]
        return cls([row for own in rows for row in own], weights, [p for p, own in enumerate(rows) for _ in own])


@dataclass(frozen=True)
class HostPass:
    """One forward and backward pass of this rank: its rows padded in buckets, or in a table. Either is made when it is
    first asked for."""

    buckets: Sequence[MicroBatch]
    rows: Sequence[TokenRow]  # of the whole step
    weights: torch.Tensor  # [P, cells], of each cell's loss in each prompt's
    pad_id: int
    packing: Packing | None = None  # None: there is no table

    @cached_property
    def cells(self) -> MicroBatch:
        """In the order of the batches."""
        return [cell for bucket in self.buckets for cell in bucket]

    @cached_property
    def tokens(self) -> int:
        """Those of the batches, padding included."""
        return bucket_tokens(self.buckets)

    @cached_property
    def batches(self) -> HostBatches:
        return collate([[self.rows[cell.row] for cell in bucket] for bucket in self.buckets], self.pad_id)

    @cached_property
    def table(self) -> Table | None:
        return self.packing and table_of(self.cells, self.rows, self.weights, self.packing)


@dataclass(frozen=True)
class StepWork:
    """This rank's share of a step."""

    rows: Sequence[TokenRow]  # of the whole step
    passes: Sequence[HostPass]
    longest: int  # tokens of the step's longest cell
    imbalance: float  # the costliest rank's padded tokens over the mean of those that share its prompts


def plan_step(
    step: StepRows,
    *,
    blocks: Sequence[range],
    particle_rank: int,
    length: int,
    data_ranks: int,
    data_rank: int,
    max_tokens: int,
    pad_id: int,
    packing: Packing | None = None,
) -> StepWork:
    """Deals the cells of a block of prompts.

    Args:
        blocks: the prompts of each block of ranks; cells number those of a block from 0.
        particle_rank: which block is this rank's.
        length: L, the prompts' tokens.
        data_ranks: of a block.
        max_tokens: padded tokens of a pass, the same on all ranks.
    """
    block, alike = blocks[particle_rank], step.prompt_of is None
    # where the blocks' rows differ, so may the passes that each would need; under ZeRO-3 all ranks make as many
    cells = [_cells_of(step, some, length) for some in ([block] if alike else blocks)]
    own = 0 if alike else particle_rank
    plan = plan_blocks(cells, data_ranks, max_tokens)[own]
    passes = [host_pass(batch, step.rows, len(block), pad_id, packing) for batch in plan[data_rank]]
    return StepWork(step.rows, passes, max(cell.tokens for cell in cells[own]), imbalance(plan))


def _cells_of(step: StepRows, block: range, length: int) -> list[Cell]:
    return [
        Cell(p, r, weight, length + len(row.source), len(row.target))
        for r, (row, weight) in enumerate(zip(step.rows, step.weights, strict=True))
        for p in _readers(step, r, block)
    ]


def _readers(step: StepRows, row: int, block: range) -> Sequence[int]:
    """Which prompts of a block read a row, numbered from the block's first."""
    if step.prompt_of is None:
        return range(len(block))
    prompt = step.prompt_of[row]
    return [prompt - block.start] if prompt in block else []


def host_pass(
    batch: MicroBatch, rows: Sequence[TokenRow], prompts: int, pad_id: int, packing: Packing | None = None
) -> HostPass:
    """The pass of a micro-batch."""
    cut = buckets(batch)
    weights = torch.zeros(prompts, len(batch))
    for i, cell in enumerate(cell for bucket in cut for cell in bucket):
        weights[cell.prompt, i] = cell.weight
    return HostPass(cut, rows, weights, pad_id, packing)
