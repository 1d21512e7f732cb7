"""The order of tasks and rows: a pure function of seed and step, and a fair one."""

import subprocess
import sys
import timeit
from collections import Counter

import numpy as np
import pytest

from bmtpt_ds.data.order import batch_positions, rows_of_step, stream, tasks_of_step


def test_known_values():
    """Runs resume on other machines and versions: these values never change."""
    assert tasks_of_step(0, 1, 6, 3) == [1, 2, 4]
    assert rows_of_step(0, 1, "sst2", 400_000, 4) == [35629, 173134, 284304, 288770]
    assert batch_positions(0, 3, 10, 4) == [4, 7, 7, 3]


def test_same_in_any_process_and_for_any_integer_type():
    code = (
        "from bmtpt_ds.data.order import *; "
        "print(tasks_of_step(5, 17, 6, 3), rows_of_step(5, 17, 'rte', 2490, 8), batch_positions(5, 17, 70, 32))"
    )
    here = f"{tasks_of_step(5, 17, 6, 3)} {rows_of_step(5, 17, 'rte', 2490, 8)} {batch_positions(5, 17, 70, 32)}"
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


@pytest.mark.parametrize(("n_rows", "batch_size"), [(10, 3), (10, 10), (7, 5), (1, 1), (64, 32)])
def test_every_epoch_visits_every_row_once(n_rows, batch_size):
    epochs = 4
    flat = [p for step in range(1, n_rows * epochs + 1) for p in batch_positions(3, step, n_rows, batch_size)]
    for epoch in range(epochs):
        assert sorted(flat[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))
    if n_rows >= 7:
        assert len({tuple(flat[e * n_rows : (e + 1) * n_rows]) for e in range(epochs)}) == epochs


def test_batches_do_not_depend_on_who_asked_before():
    forward = [batch_positions(3, step, 11, 4) for step in range(1, 40)]
    backward = [batch_positions(3, step, 11, 4) for step in range(39, 0, -1)]
    assert forward == backward[::-1]
    assert forward != [batch_positions(4, step, 11, 4) for step in range(1, 40)]
    first = batch_positions(3, 1, 11, 4)
    first[0] = 99  # a caller's change stays the caller's
    assert batch_positions(3, 1, 11, 4) == forward[0]


def test_impossible_requests():
    for call in (
        lambda: tasks_of_step(0, 0, 6, 2),
        lambda: tasks_of_step(0, 1, 6, 7),
        lambda: tasks_of_step(0, 1, 6, 0),
        lambda: rows_of_step(0, 0, "rte", 10, 2),
        lambda: rows_of_step(0, 1, "rte", 10, 11),
        lambda: batch_positions(0, 0, 10, 2),
        lambda: batch_positions(0, 1, 10, 11),
        lambda: batch_positions(0, 1, 10, 0),
    ):
        with pytest.raises(ValueError):
            call()


def test_cheap_on_large_tasks():
    seconds = min(timeit.repeat(lambda: rows_of_step(0, 7, "mnli", 400_000, 32), number=20, repeat=5)) / 20
    assert seconds < 1e-3
