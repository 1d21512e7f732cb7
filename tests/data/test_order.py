"""The order of tasks and rows: a pure function of seed and step, and a fair one."""

import subprocess
import sys
import timeit
from collections import Counter

import numpy as np
import pytest

from bmtpt_ds.data.order import mixed_batch, mixed_rows, rows_of_step, stream, tasks_of_step


def test_known_values():
    """Runs resume on other machines and versions: these values never change."""
    assert tasks_of_step(0, 1, 6, 3) == [1, 2, 4]
    assert rows_of_step(0, 1, "sst2", 400_000, 4) == [35629, 173134, 284304, 288770]
    assert mixed_batch(0, 3, {"rte": 10}, 4) == [(0, 4), (0, 7), (0, 7), (0, 3)]
    assert mixed_batch(0, 9, {"cb": 3, "rte": 10}, 4, cap=5) == [(1, 2), (0, 1), (1, 4), (1, 9)]


def test_same_in_any_process_and_for_any_integer_type():
    code = (
        "from bmtpt_ds.data.order import *; "
        "print(tasks_of_step(5, 17, 6, 3), rows_of_step(5, 17, 'rte', 2490, 8), mixed_batch(5, 17, {'rte': 70}, 32))"
    )
    here = f"{tasks_of_step(5, 17, 6, 3)} {rows_of_step(5, 17, 'rte', 2490, 8)} {mixed_batch(5, 17, {'rte': 70}, 32)}"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert rows_of_step(np.int64(5), np.int64(17), "rte", 2490, 8) == rows_of_step(5, 17, "rte", 2490, 8)


def test_tasks_without_replacement_and_evenly():
    seen = Counter()
    for step in range(1, 1001):
        tasks = tasks_of_step(0, step, 6, 2)
        assert len(set(tasks)) == 2 and tasks == sorted(tasks) and set(tasks) <= set(range(6))
        seen.update(tasks)
    assert all(260 <= seen[task] <= 410 for task in range(6))  # mean 333, standard deviation 15
    assert tasks_of_step(0, 9, 6, 6) == list(range(6))


def test_rows_without_replacement_and_evenly():
    seen = Counter()
    for step in range(1, 2001):
        rows = rows_of_step(0, step, "cola", 10, 3)
        assert len(set(rows)) == 3 and rows == sorted(rows) and set(rows) <= set(range(10))
        seen.update(rows)
    assert all(500 <= seen[row] <= 700 for row in range(10))  # mean 600, standard deviation 20
    assert rows_of_step(0, 1, "cola", 10, 10) == list(range(10))


def test_seed_step_and_task_each_change_the_rows():
    base = rows_of_step(0, 1, "cola", 5000, 8)
    others = [(1, 1, "cola"), (0, 2, "cola"), (0, 1, "rte"), (0, 11, "cola"), (1, 2, "cola")]
    drawn = [base] + [rows_of_step(*key, 5000, 8) for key in others]
    assert len({tuple(rows) for rows in drawn}) == len(drawn)
    # Labels keep streams apart, and so do the places of the numbers.
    draws = [stream(*key).randint(2**31) for key in [("a", 1, 2), ("b", 1, 2), ("a", 12), ("a", 2, 1), ("a", 1, 2, 0)]]
    assert len(set(draws)) == len(draws)


def _drawn(n_rows, batch_size, steps, **cap):
    return [draw for step in range(1, steps + 1) for draw in mixed_batch(3, step, n_rows, batch_size, **cap)]


@pytest.mark.parametrize("n_rows", [{"a": 10}, {"a": 1}, {"a": 64}, {"a": 3, "b": 7}, {"a": 1, "b": 1, "c": 30}])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 32])
def test_every_epoch_visits_every_row_once(n_rows, batch_size):
    everything = [(k, row) for k, size in enumerate(n_rows.values()) for row in range(size)]
    count, epochs = len(everything), 4
    batch_size = min(batch_size, count)
    flat = _drawn(n_rows, batch_size, -(-count * epochs // batch_size))
    for epoch in range(epochs):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == everything
    if count >= 7:
        assert len({tuple(flat[e * count : (e + 1) * count]) for e in range(epochs)}) == epochs


def test_large_tasks_are_capped_and_yet_read_whole():
    """Of 3 + 5 + 5 rows an epoch; the 12 of one and the 6 of the other come evenly, epoch after epoch."""
    n_rows, cap = {"a": 3, "b": 12, "c": 6}, 5
    assert mixed_rows(n_rows, cap) == 13
    flat = _drawn(n_rows, 13, 12, cap=cap)
    for epoch in range(12):
        counts = Counter(k for k, _ in flat[epoch * 13 : (epoch + 1) * 13])
        assert counts == {0: 3, 1: 5, 2: 5}
    seen = Counter(flat)
    assert {row for k, row in seen if k == 1} == set(range(12))
    assert all(seen[1, row] == 5 for row in range(12))  # 12 epochs x 5 rows
    assert all(seen[2, row] == 10 for row in range(6))
    assert len({tuple(row for k, row in flat[e * 13 : (e + 1) * 13] if k == 1) for e in range(12)}) == 12


def test_mixing_is_in_proportion_to_the_rows_up_to_two_to_the_18():
    """The full GLUE sizes: mnli and qqp count as 262,144 rows each."""
    n_rows = {"mnli": 392_702, "qqp": 362_846, "sst2": 66_349, "rte": 2490}
    assert mixed_rows(n_rows) == 2 * 2**18 + 66_349 + 2490
    counts = Counter(k for k, _ in _drawn(n_rows, 32, 2000))
    for k, size in enumerate(n_rows.values()):
        expected = 64_000 * min(size, 2**18) / mixed_rows(n_rows)
        assert abs(counts[k] - expected) < 5 * expected**0.5


def test_batches_do_not_depend_on_who_asked_before():
    n_rows = {"a": 4, "b": 7}
    forward = [mixed_batch(3, step, n_rows, 4, cap=5) for step in range(1, 40)]
    backward = [mixed_batch(3, step, n_rows, 4, cap=5) for step in range(39, 0, -1)]
    assert forward == backward[::-1]
    assert forward != [mixed_batch(4, step, n_rows, 4, cap=5) for step in range(1, 40)]
    first = mixed_batch(3, 1, n_rows, 4, cap=5)
    first[0] = 99  # a caller's change stays the caller's
    assert mixed_batch(3, 1, n_rows, 4, cap=5) == forward[0]


def test_impossible_requests():
    for call in (
        lambda: tasks_of_step(0, 0, 6, 2),
        lambda: tasks_of_step(0, 1, 6, 7),
        lambda: tasks_of_step(0, 1, 6, 0),
        lambda: rows_of_step(0, 0, "rte", 10, 2),
        lambda: rows_of_step(0, 1, "rte", 10, 11),
        lambda: mixed_batch(0, 0, {"a": 10}, 2),
        lambda: mixed_batch(0, 1, {"a": 10}, 11),
        lambda: mixed_batch(0, 1, {"a": 10}, 0),
    ):
        with pytest.raises(ValueError):
            call()


def test_cheap_on_large_tasks():
    large = {"mnli": 392_702, "qqp": 362_846}
    for draw in (lambda: rows_of_step(0, 7, "mnli", 400_000, 32), lambda: mixed_batch(0, 7, large, 32)):
        assert min(timeit.repeat(draw, number=20, repeat=5)) / 20 < 1e-3
