"""The micro-batch plan: which cells a rank computes, in which order, so that all ranks are done at the same time.

Under ZeRO-3 a rank that makes one pass more than the others waits for ever, so all ranks compute the same plan from the
same cells, without communication. How the cells are split changes only the rounding of the step's gradient.

Cells are sorted by length and cut into runs of neighbours, which pad each other little. A run of n cells costs n times
its longest, so the runs of long cells have few and those of short ones many: the cut makes the costliest run as cheap
as can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Cell:
    """One row seen through one prompt: the unit of work of a step."""

    prompt: int  # which of the prompts
    row: int  # which of the step's rows
    weight: float  # of its loss in the step's loss
    source_tokens: int  # encoder tokens, prompt included
    target_tokens: int

    @property
    def tokens(self) -> int:
        return self.source_tokens + self.target_tokens


MicroBatch = list[Cell]
Plan = list[list[MicroBatch]]  # of each rank


def plan_micro_batches(cells: Sequence[Cell], ranks: int, max_tokens: int) -> Plan:
    """Cuts a step's cells into micro-batches and deals these to the ranks.

    Args:
        cells: all cells of the step, at least one.
        ranks: data ranks.
        max_tokens: padded tokens that a micro-batch may have; one with a single cell may have more.

    Returns:
        plan[rank][i], the i-th micro-batch of a rank; those of one i cost nearly the same. Every rank has the same
        number of them, the least that `max_tokens` allows, and none is empty: where a rank has too few cells, a copy of
        weight 0 fills in.
    """
    if not cells:
        raise ValueError("a step without cells")
    longest_first = sorted(cells, key=lambda c: (-c.source_tokens, -c.target_tokens, c.row, c.prompt))
    widths = _widths(longest_first)
    passes = max(1, min(sum(c.tokens for c in cells) // (ranks * max_tokens), -(-len(cells) // ranks)))
    while True:
        batches = [longest_first[i:j] for i, j in pairwise(_even_cut(widths, passes * ranks))]
        if all(len(batch) == 1 or padded_tokens(batch) <= max_tokens for batch in batches):
            return _deal(batches, ranks, passes, filler=replace(longest_first[-1], weight=0.0))
        passes += 1


def padded_tokens(batch: MicroBatch) -> int:
    """Tokens that a micro-batch computes, padding included."""
    return len(batch) * (max(c.source_tokens for c in batch) + max(c.target_tokens for c in batch))


def imbalance(plan: Plan) -> float:
    """The costliest rank's padded tokens over the ranks' mean, 1 at best; what only fills in is no work."""
    costs = [sum(padded_tokens(batch) for batch in batches if batch[0].weight) for batches in plan]
    return max(costs) * len(costs) / sum(costs)


def _widths(longest_first: Sequence[Cell]) -> list[int]:
    """widths[i], at least the padded tokens of each cell in a run that begins at i; they never grow with i."""
    targets = accumulate((c.target_tokens for c in reversed(longest_first)), max)
    return [c.source_tokens + target for c, target in zip(longest_first, reversed(list(targets)), strict=True)]


def _even_cut(widths: Sequence[int], runs: int) -> list[int]:
    """Where to cut the cells into so many runs (one a cell where there are fewer) of the least greatest cost."""
    low = max(widths[0], sum(widths) // runs)
    high = widths[0] * -(-len(widths) // runs)
    while low < high:  # the least cost with which the runs suffice
        middle = (low + high) // 2
        if len(_cut(widths, middle, runs)) - 1 <= runs:
            high = middle
        else:
            low = middle + 1
    ends = _cut(widths, high, runs)
    while len(ends) - 1 < min(runs, len(widths)):  # some are left: halve the costliest that can be
        sizes = [j - i for i, j in pairwise(ends)]
        at = max(range(len(sizes)), key=lambda k: (sizes[k] > 1) * sizes[k] * widths[ends[k]])
        ends.insert(at + 1, ends[at] + (sizes[at] + 1) // 2)
    return ends


def _cut(widths: Sequence[int], cost: int, runs: int) -> list[int]:
    """The ends of runs, from the longest cells on, that cost no more than `cost`; given up after more than `runs`."""
    ends = [0]
    while ends[-1] < len(widths) and len(ends) <= runs + 1:
        ends.append(min(len(widths), ends[-1] + max(1, cost // widths[ends[-1]])))
    return ends


def _deal(batches: list[MicroBatch], ranks: int, passes: int, filler: Cell) -> Plan:
    """Costliest first, a pass of all ranks at a time, back and forth: what one pass gives more the next gives less."""
    batches = sorted(batches, key=lambda batch: -padded_tokens(batch))
    batches += [[filler]] * (ranks * passes - len(batches))
    rounds = [batches[i : i + ranks][:: 1 if (i // ranks) % 2 == 0 else -1] for i in range(0, len(batches), ranks)]
    return [list(of_rank) for of_rank in zip(*rounds, strict=True)]
