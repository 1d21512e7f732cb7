"""Which tasks and rows a step takes, as a pure function of the training seed and the step.

Nothing here keeps state: a run that resumes at step t, on any number of ranks, asks for step t and gets the rows that a
run never stopped would have had. Steps count from 1.
"""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b

import numpy as np

MIXING_CAP = 2**18  # rows of a task that count when tasks are mixed


def stream(label: str, *parts: int | str) -> np.random.RandomState:
    """A random stream of its own for every (label, parts), the same on every machine.

    The label keeps uses of one seed apart. blake2 rather than `hash`, which changes with every process; RandomState
    rather than Generator, since numpy promises never to change what a RandomState draws from a given bit generator.
    """
    digest = blake2b("/".join(map(str, (label, *parts))).encode(), digest_size=16).digest()
    return np.random.RandomState(np.random.PCG64(int.from_bytes(digest, "little")))


def tasks_of_step(seed: int, step: int, n_tasks: int, tasks_per_step: int, particle: int = 0) -> list[int]:
    """The tasks of source step `step`: `tasks_per_step` of range(n_tasks) without replacement, in ascending order.

    Raises ValueError when there are fewer tasks than a step takes, or when step < 1.

    Args:
        particle: whose tasks, where particles draw their own; the first one's are those of all where they do not.
    """
    return _sample(stream("tasks", seed, _from_one(step), *_own(particle)), n_tasks, tasks_per_step)


def rows_of_step(seed: int, step: int, task_name: str, n_rows: int, rows_per_task: int, particle: int = 0) -> list[int]:
    """The rows of one task in source step `step`: `rows_per_task` of range(n_rows) without replacement, ascending.

    A pure function of its arguments: a task's rows do not depend on which other tasks the run or the step has.
    Raises ValueError when there are fewer rows than a step takes, or when step < 1.

    Args:
        particle: as `tasks_of_step`.
    """
    return _sample(stream("rows", seed, _from_one(step), task_name, *_own(particle)), n_rows, rows_per_task)


def drawn_rows(
    seed: int, step: int, n_rows: Mapping[str, int], tasks_per_step: int, rows_per_task: int, particle: int = 0
) -> list[tuple[int, int]]:
    """The rows of source step `step`, as (which task, which of its rows): `rows_of_step` of each of `tasks_of_step`.

    Args:
        n_rows: of each task, by name.
        particle: as `tasks_of_step`.
    """
    names = list(n_rows)
    return [
        (k, i)
        for k in tasks_of_step(seed, step, len(names), tasks_per_step, particle)
        for i in rows_of_step(seed, step, names[k], n_rows[names[k]], rows_per_task, particle)
    ]


def mixed_batch(
    seed: int, step: int, n_rows: Mapping[str, int], batch_size: int, cap: int = MIXING_CAP
) -> list[tuple[int, int]]:
    """The rows of adaptation step `step`, as (which task, which of its rows).

    Tasks are drawn in proportion to their rows, of which at most `cap` count (example-proportional mixing, Raffel et
    al. 2020, section 3.5.2). An epoch is a permutation of all rows that count; the batches cut the endless
    concatenation of epochs, so an epoch visits every row once and a batch may reach into the next one (and then hold a
    row twice). Of a task with more than `cap` rows an epoch takes the next `cap` of an endless walk through all.

    Args:
        n_rows: of each task, by name.

    Raises ValueError when batch_size is not within 1..rows that count, or when step < 1.
    """
    pool = mixed_rows(n_rows, cap)
    if not 1 <= batch_size <= pool:
        raise ValueError(f"a batch of {batch_size} from {pool} rows")
    names, sizes = list(n_rows), list(n_rows.values())
    ends = np.cumsum([min(size, cap) for size in sizes])
    draws = []
    for place in range((_from_one(step) - 1) * batch_size, step * batch_size):
        epoch, at = divmod(place, pool)
        slot = int(_permutation(pool, "epoch", seed, epoch)[at])
        k = int(np.searchsorted(ends, slot, side="right"))
        row = slot - int(ends[k]) + min(sizes[k], cap)
        if sizes[k] > cap:
            lap, at = divmod(epoch * cap + row, sizes[k])
            row = int(_permutation(sizes[k], "walk", seed, names[k], lap)[at])
        draws.append((k, row))
    return draws


def mixed_rows(n_rows: Mapping[str, int], cap: int = MIXING_CAP) -> int:
    """How many rows an epoch of `mixed_batch` has."""
    return sum(min(size, cap) for size in n_rows.values())


# Two epochs are in use where a batch spans them, and of each task above the cap two walks.
@lru_cache(maxsize=16)
def _permutation(n: int, label: str, *parts: int | str) -> np.ndarray:
    order = stream(label, *parts).permutation(n)
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


def _own(particle: int) -> tuple[int, ...]:
    """What tells a particle's random streams from those of the first."""
    return (particle,) if particle else ()


def _from_one(step: int) -> int:
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    return step
