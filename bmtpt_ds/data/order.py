"""Which tasks and rows a step takes, as a pure function of the training seed and the step.

Nothing here keeps state: a run that resumes at step t, on any number of ranks, asks for step t and gets the rows that a
run never stopped would have had. Steps count from 1.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np


def stream(label: str, *parts: int | str) -> np.random.RandomState:
    """A random stream of its own for every (label, parts), the same on every machine.

    The label keeps uses of one seed apart. blake2 rather than `hash`, which changes with every process; RandomState
    rather than Generator, since numpy promises never to change what a RandomState draws from a given bit generator.
    """
    digest = blake2b("/".join(map(str, (label, *parts))).encode(), digest_size=16).digest()
    return np.random.RandomState(np.random.PCG64(int.from_bytes(digest, "little")))


def tasks_of_step(seed: int, step: int, n_tasks: int, tasks_per_step: int) -> list[int]:
    """The tasks of source step `step`: `tasks_per_step` of range(n_tasks) without replacement, in ascending order.

    Raises ValueError when there are fewer tasks than a step takes, or when step < 1.
    """
    return _sample(stream("tasks", seed, _from_one(step)), n_tasks, tasks_per_step)


def rows_of_step(seed: int, step: int, task_name: str, n_rows: int, rows_per_task: int) -> list[int]:
    """The rows of one task in source step `step`: `rows_per_task` of range(n_rows) without replacement, ascending.

    A pure function of its arguments: a task's rows do not depend on which other tasks the run or the step has.
    Raises ValueError when there are fewer rows than a step takes, or when step < 1.
    """
    return _sample(stream("rows", seed, _from_one(step), task_name), n_rows, rows_per_task)


def batch_positions(seed: int, step: int, n_rows: int, batch_size: int) -> list[int]:
    """The rows of adaptation step `step`.

    Every epoch is a permutation of range(n_rows); the batches cut the endless concatenation of these, so an epoch
    visits every row once and a batch may reach into the next epoch (and then hold a row twice).
    Raises ValueError when batch_size is not within 1..n_rows, or when step < 1.
    """
    if not 1 <= batch_size <= n_rows:
        raise ValueError(f"a batch of {batch_size} from {n_rows} rows")
    epoch, first = divmod((_from_one(step) - 1) * batch_size, n_rows)
    batch = _epoch(seed, epoch, n_rows)[first : first + batch_size].tolist()
    if len(batch) < batch_size:
        batch += _epoch(seed, epoch + 1, n_rows)[: batch_size - len(batch)].tolist()
    return batch


# Two epochs are in use where a batch spans them; the rest leaves room for a second caller.
@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    order = stream("epoch", seed, epoch).permutation(n_rows)
    order.flags.writeable = False  # shared by all callers through the cache
    return order


def _sample(random: np.random.RandomState, n: int, k: int) -> list[int]:
    """k of range(n) without replacement, ascending, in O(k): Floyd's algorithm, no permutation of all n."""
    if not 1 <= k <= n:
        raise ValueError(f"cannot draw {k} of {n} without replacement")
    last = np.arange(n - k, n)
    taken: set[int] = set()
    for candidate, top in zip(random.randint(0, last + 1).tolist(), last.tolist(), strict=True):
        taken.add(top if candidate in taken else candidate)
    return sorted(taken)


def _from_one(step: int) -> int:
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    return step
