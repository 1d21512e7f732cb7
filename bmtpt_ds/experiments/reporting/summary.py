"""One figure a method and number of labelled rows: the mean over all tasks, whatever benchmarks they are of."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bmtpt_ds.experiments.reporting.groups import Group, in_order
from bmtpt_ds.experiments.reporting.statistics import Cell, mean_over_tasks
from bmtpt_ds.experiments.reporting.tables import by_benchmark


@dataclass(frozen=True)
class Line:
    """A method on a model."""

    label: str
    model: str  # "" of the majority class
    tasks: frozenset[str]  # that its means are over: those that all its numbers of shots have
    rows_source: tuple[int, ...]  # row passes of its source stages, the different ones ascending
    cells: dict[int | None, Cell]  # by shots, None: all rows


@dataclass(frozen=True)
class Summary:
    """The means over tasks, in the tasks' headline metrics."""

    shots: list[int | None]  # ascending
    lines: list[Line]

    @property
    def comparable(self) -> bool:
        """Whether all lines are over the same tasks."""
        return len({line.tasks for line in self.lines}) == 1


def summary(groups: Sequence[Group]) -> Summary | None:
    """The groups by method and model, after a line of always giving a split's most frequent answer where all lines are
    over the same tasks. None where tables by benchmark say it all: of one benchmark and one number of shots."""
    shots = in_order(group.shots for group in groups)
    if len(shots) == 1 and len(by_benchmark(groups)) == 1:
        return None
    series: dict[tuple[str, str], list[Group]] = {}
    # in the order of the most shots: at 0 some methods have none
    for group in sorted(groups, key=lambda group: shots.index(group.shots), reverse=True):
        series.setdefault((group.label, group.model), []).append(group)
    lines = [line for key, of_line in series.items() if (line := _line(*key, of_line)).tasks]
    if len({line.tasks for line in lines}) == 1:
        tasks = lines[0].tasks
        lines = [Line("majority class", "", tasks, (), dict.fromkeys(shots, Cell(_majority(groups, tasks)))), *lines]
    return Summary(shots, lines) if lines else None


def _majority(groups: Sequence[Group], tasks: frozenset[str]) -> float:
    scored = {task: scores for group in groups for run in group.runs for task, scores in run.tasks.items()}
    return fmean(scored[task]["majority"] for task in tasks)


def _line(label: str, model: str, groups: Sequence[Group]) -> Line:
    tasks = frozenset.intersection(*(frozenset(group.tasks) for group in groups))
    cells = {g.shots: mean_over_tasks([g.scores(task) for task in sorted(tasks)]) for g in groups} if tasks else {}
    processed = {run.rows_processed[0] for group in groups for run in group.runs}
    return Line(label, model, tasks, tuple(sorted(processed)), cells)
