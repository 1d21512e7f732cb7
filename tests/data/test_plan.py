import random

import pytest

from bmtpt_ds.data.plan import Cell, padded_tokens, plan_micro_batches


def cells(count: int, seed: int = 0) -> list[Cell]:
    draw = random.Random(seed)
    return [Cell(i % 3, i // 3, 1 / count, draw.randint(5, 90), draw.randint(2, 6)) for i in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 6, 30, 61])
@pytest.mark.parametrize("budget", [1, 200, 10**9])
def test_every_cell_once_and_as_many_micro_batches_on_every_rank(ranks: int, count: int, budget: int) -> None:
    given = cells(count)
    plan = plan_micro_batches(given, ranks, budget)
    assert len(plan) == ranks
    assert len({len(batches) for batches in plan}) == 1
    assert all(batch for batches in plan for batch in batches)
    done = [c for batches in plan for batch in batches for c in batch if c.weight]
    assert sorted(done, key=given.index) == given


@pytest.mark.parametrize("budget", [120, 300, 1000])
def test_no_micro_batch_of_several_cells_is_over_the_budget(budget: int) -> None:
    for batches in plan_micro_batches(cells(40), 3, budget):
        assert all(len(batch) == 1 or padded_tokens(batch) <= budget for batch in batches)


def test_no_more_micro_batches_than_needed() -> None:
    assert len(plan_micro_batches(cells(30), 2, 10**9)[0]) == 1


def test_padding_counts() -> None:
    assert padded_tokens([Cell(0, 0, 1, 10, 2), Cell(0, 1, 1, 4, 5)]) == 2 * (10 + 5)


def test_a_step_without_cells_is_a_fault() -> None:
    with pytest.raises(ValueError, match="without cells"):
        plan_micro_batches([], 2, 100)
