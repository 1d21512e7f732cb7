"""Means with deviations over seeds, and differences of paired runs with a bootstrap interval."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_TIE = 1e-9  # points; below it two scores are the same but for rounding


class Cell(NamedTuple):
    """A figure of a table, in points from 0 to 100 (correlations from -100)."""

    mean: float
    std: float | None = None  # sample standard deviation over seeds; None of fewer than two
    seeds: int | None = None  # None where that is not what it is a mean of

    @classmethod
    def of(cls, values: Sequence[float]) -> "Cell | None":
        """Of a score a seed; None of none."""
        if not values:
            return None
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def mean_over_tasks(scores: Sequence[Mapping[int, float]]) -> Cell:
    """Of each task's scores by seed: a mean a seed where all tasks have the same seeds, else the mean of the tasks'
    means, without a deviation."""
    seeds = set(scores[0])
    if all(set(of_task) == seeds for of_task in scores):
        return Cell.of([fmean(of_task[seed] for of_task in scores) for seed in sorted(seeds)])
    return Cell(fmean(fmean(of_task.values()) for of_task in scores))


class Difference(NamedTuple):
    """How much better one group is than another, over the tasks and seeds that both have."""

    mean: float  # points; over tasks of the mean over a task's pairs
    interval: tuple[float, float] | None  # bootstrap percentiles at LEVEL; None of a single pair
    wins: int  # pairs in which it scores higher
    ties: int
    losses: int

    @property
    def pairs(self) -> int:
        return self.wins + self.ties + self.losses


def paired_difference(
    ours: Mapping[str, Mapping[int, float]], theirs: Mapping[str, Mapping[int, float]]
) -> Difference | None:
    """The difference `ours` - `theirs` over the pairs of the same task and seed.

    Args:
        ours, theirs: by task and seed the scores.

    Returns:
        None where they have no pair.
    """
    by_task = {
        task: np.array([score - theirs[task][seed] for seed, score in scores.items() if seed in theirs[task]])
        for task, scores in ours.items()
        if task in theirs
    }
    groups = [differences for differences in by_task.values() if len(differences)]
    if not groups:
        return None
    all_pairs = np.concatenate(groups)
    return Difference(
        float(np.mean([differences.mean() for differences in groups])),
        bootstrap_interval(groups),
        int((all_pairs > _TIE).sum()),
        int((abs(all_pairs) <= _TIE).sum()),
        int((all_pairs < -_TIE).sum()),
    )


def bootstrap_interval(groups: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of the mean over groups of their means, by a hierarchical bootstrap.

    A resample draws as many groups (tasks) as there are, with replacement, and from each as many values (pairs of a
    seed) as it has, with replacement (Davison and Hinkley, 1997, section 3.8). From few seeds or tasks such intervals
    are too narrow.

    Args:
        groups: one-dimensional, at least one value each.
        seed: of the resamples: the same values give the same interval.

    Returns:
        the ends of the interval; None of a single value.
    """
    counts = np.array([len(values) for values in groups])
    if counts.sum() < 2:
        return None
    padded = np.zeros((len(groups), counts.max()))
    for row, values in zip(padded, groups, strict=True):
        row[: len(values)] = values
    generator = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for _ in groups:  # a slot of the resample: a task drawn twice has its seeds drawn twice
        drawn = generator.integers(len(groups), size=RESAMPLES)
        places = (generator.random((RESAMPLES, counts.max())) * counts[drawn, None]).astype(int)
        values = padded[drawn[:, None], places]
        used = np.arange(counts.max()) < counts[drawn, None]
        means += (values * used).sum(axis=1) / counts[drawn] / len(groups)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
