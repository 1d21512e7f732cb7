"""The micro-batch plan: which cells a rank computes, in which order, so that all ranks are done at the same time.

Under ZeRO-3 a rank that makes one pass more than the others waits for ever, so all ranks compute the same plan from the
same cells, without communication. How the cells are split changes only the rounding of the step's gradient.

A pass takes rows of any lengths side by side (`model/packed.py`), so a micro-batch costs what its cells have in tokens,
and cells are dealt one by one, the longest first, each to the micro-batch that has least. Within one, cells of equal
length form a bucket; where two buckets would be a few tokens apart, padding the shorter rows costs less than a bucket
of their own.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

# tokens that a bucket of its own must spare: its attention is a call of its own in each layer
_BUCKET_COST = 32


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
    """Deals a step's cells to micro-batches and these to the ranks.

    Args:
        cells: all cells of the step, at least one.
        ranks: data ranks.
        max_tokens: padded tokens that a micro-batch may have; one with a single cell may have more.

    Returns:
        plan[rank][i], the i-th micro-batch of a rank; those of one i cost nearly the same. Every rank has the same
        number of them, the least that `max_tokens` allows, and none is empty: where a rank has too few cells, a copy of
        weight 0 fills in.
    """
    return plan_blocks([cells], ranks, max_tokens)[0]


def plan_blocks(blocks: Sequence[Sequence[Cell]], ranks: int, max_tokens: int) -> list[Plan]:
    """As `plan_micro_batches`, of several blocks of cells, each on as many ranks of its own: a plan of each.

    All ranks of all blocks have the same number of micro-batches, whatever their cells.
    """
    if not all(blocks):
        raise ValueError("a step without cells")
    longest_first = [sorted(cells, key=lambda c: (-c.tokens, -c.source_tokens, c.row, c.prompt)) for cells in blocks]
    passes = max(1, *(min(sum(c.tokens for c in b) // (ranks * max_tokens), -(-len(b) // ranks)) for b in blocks))
    while True:
        dealt = [_deal_cells(cells, passes * ranks) for cells in longest_first]
        if all(len(batch) == 1 or padded_tokens(batch) <= max_tokens for batches in dealt for batch in batches):
            fillers = [replace(cells[-1], weight=0.0) for cells in longest_first]
            return [_deal(batches, ranks, passes, filler) for batches, filler in zip(dealt, fillers, strict=True)]
        passes += 1


def buckets(batch: MicroBatch) -> list[list[Cell]]:
    """A micro-batch's cells in buckets of about the same length, those of the longest first.

    Of all ways to cut the cells, sorted by length, the one that costs least: padded tokens, and a few for each bucket.
    """
    counts = Counter((cell.source_tokens, cell.target_tokens) for cell in batch)
    shapes = sorted(counts, reverse=True)
    costs, starts = [0], [0]  # of the best cut of the first j shapes, and where its last bucket begins
    for j in range(1, len(shapes) + 1):
        rows, targets, best = 0, 0, (1 << 62, 0)
        for i in range(j - 1, -1, -1):
            rows += counts[shapes[i]]
            targets = max(targets, shapes[i][1])
            best = min(best, (costs[i] + rows * (shapes[i][0] + targets) + _BUCKET_COST, i))
        costs.append(best[0])
        starts.append(best[1])
    cut, end = {}, len(shapes)
    while end:
        cut |= dict.fromkeys(shapes[starts[end] : end], starts[end])
        end = starts[end]
    found: dict[int, list[Cell]] = {start: [] for start in sorted(cut.values())}
    for cell in batch:
        found[cut[cell.source_tokens, cell.target_tokens]].append(cell)
    return list(found.values())


def padded_tokens(batch: MicroBatch) -> int:
    """Tokens that a micro-batch computes, padding included."""
    return bucket_tokens(buckets(batch))


def bucket_tokens(cut: Sequence[Sequence[Cell]]) -> int:
    """Tokens of cells that are padded to the longest of their bucket."""
    return sum(
        len(bucket) * (max(c.source_tokens for c in bucket) + max(c.target_tokens for c in bucket)) for bucket in cut
    )


def imbalance(plan: Plan) -> float:
    """The costliest rank's padded tokens over the ranks' mean, 1 at best; what only fills in is no work."""
    costs = [sum(padded_tokens(batch) for batch in batches if batch[0].weight) for batches in plan]
    return max(costs) * len(costs) / sum(costs)


def _deal_cells(longest_first: Sequence[Cell], count: int) -> list[MicroBatch]:
    """At most so many micro-batches of nearly equal cost: the next cell goes where there is least."""
    batches: list[MicroBatch] = [[] for _ in range(min(count, len(longest_first)))]
    loads = [(0, i) for i in range(len(batches))]  # a heap
    for cell in longest_first:
        tokens, i = loads[0]
        batches[i].append(cell)
        heapq.heapreplace(loads, (tokens + cell.tokens, i))
    return batches


def _deal(batches: list[MicroBatch], ranks: int, passes: int, filler: Cell) -> Plan:
    """Costliest first, a pass of all ranks at a time, back and forth: what one pass gives more the next gives less."""
    batches = sorted(batches, key=lambda batch: -padded_tokens(batch))
    batches += [[filler]] * (ranks * passes - len(batches))
    rounds = [batches[i : i + ranks][:: 1 if (i // ranks) % 2 == 0 else -1] for i in range(0, len(batches), ranks)]
    return [list(of_rank) for of_rank in zip(*rounds, strict=True)]
