"""The figures of the report: a section a benchmark, and paired differences from baselines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from bmtpt_ds.config.values import repeated
from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.experiments.reporting.groups import SCRATCH, Group, differing
from bmtpt_ds.experiments.reporting.paper import COLA, PaperRow, benchmarks, paper_rows
from bmtpt_ds.experiments.reporting.statistics import Cell, Difference, mean_over_tasks, paired_difference

OTHER = "Other tasks"
_SHORT = {"accuracy": "acc.", "matthews": "Matthews"}
BASELINE_METHOD = "prompt_tuning"
TRANSFER_METHOD = "vanilla_transfer"  # a baseline too: a source stage without a posterior
NEVER_RUN = ("hyperformer", "hyperdecoder")


class Column(NamedTuple):
    """A task by one of its metrics; `task` is "" for the mean over tasks, `metric` then that of CoLA among them."""

    task: str
    metric: str
    doubled: bool = False  # whether another column has the same task

    @property
    def heading(self) -> str:
        name = self.task or "mean"
        if self.doubled or (self.metric and not self.task):
            return f"{name} ({_SHORT.get(self.metric, self.metric)})"
        return name


@dataclass(frozen=True)
class Row:
    """A line of a section."""

    origin: str  # ours; majority; paper: run by its authors; quoted: by them, from others
    label: str
    model: str
    shots: int | None  # None: all training rows; 0: not adapted
    seeds: tuple[int, ...]  # of its tasks the different numbers of seeds, ascending; empty where unknown
    rows_source: tuple[int, ...]  # rows times prompts processed in training, the different ones ascending
    rows_target: tuple[int, ...]
    cells: dict[Column, Cell]


@dataclass(frozen=True)
class Section:
    """The scores on a benchmark's tasks."""

    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]

    def part_of(self, mean: Column) -> list[Column]:
        """The columns that a column of means is over."""
        return [c for c in self.columns if c.task and (c.metric == mean.metric or not c.doubled)]


def sections(groups: Sequence[Group]) -> list[Section]:
    """The groups' scores beside those of the paper, a section for each benchmark that they have tasks of."""
    found = []
    for title, tasks in by_benchmark(groups).items():
        found.append(_section(title, tasks, [group for group in groups if set(group.tasks) & set(tasks)]))
    return found


def by_benchmark(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The groups' tasks by benchmark, those of none last."""
    there = list(dict.fromkeys(task for group in groups for task in group.tasks))
    known = {task for tasks in benchmarks().values() for task in tasks}
    parts = {title: [task for task in tasks if task in there] for title, tasks in benchmarks().items()}
    parts[OTHER] = [task for task in there if task not in known]
    return {title: tasks for title, tasks in parts.items() if tasks}


def _section(title: str, tasks: Sequence[str], groups: Sequence[Group]) -> Section:
    columns = _columns(tasks, groups)
    section = Section(title, columns, [], _notes(tasks, groups))
    section.rows.append(_majority(section, groups))
    for model, shots in dict.fromkeys((group.model, group.shots) for group in groups):
        here = [group for group in groups if (group.model, group.shots) == (model, shots)]
        section.rows.extend(_ours(section, group) for group in here)
        for row in _beside(here):
            section.rows.extend(_theirs(section, row))
    return section


def _beside(groups: Sequence[Group]) -> list[PaperRow]:
    """The paper's rows of the groups' models, shots and settings."""
    asked = {(group.model, group.shots, group.multi) for group in groups}
    return [row for row in paper_rows() if (row.model, row.shots, row.setting == "multi-task") in asked]


def _columns(tasks: Sequence[str], groups: Sequence[Group]) -> list[Column]:
    columns = []
    for task in tasks:
        scores = [run.tasks[task] for group in groups for run in group.runs if task in run.tasks]
        both = ("accuracy", "matthews")
        if task == COLA and all(set(both) <= of_run["metrics"].keys() for of_run in scores):
            columns += [Column(task, metric, True) for metric in both]
        else:
            columns.append(Column(task, scores[0]["metric"]))
    if len(tasks) > 1:
        columns += [Column("", metric) for metric in [c.metric for c in columns if c.doubled] or [""]]
    return columns


def _majority(section: Section, groups: Sequence[Group]) -> Row:
    """Of always giving a split's most frequent answer, whatever the model; correlations with a constant are 0."""
    cells = {}
    for column in section.columns:
        having = [run.tasks[column.task] for group in groups for run in group.runs if column.task in run.tasks]
        if having:
            is_headline = column.metric == having[0]["metric"]
            cells[column] = Cell(having[0]["majority"] if is_headline else 0.0)
    return _with_means(section, Row("majority", "majority class", "", None, (), (), (), cells))


def _ours(section: Section, group: Group) -> Row:
    tasks = {column.task for column in section.columns}
    runs = [run for run in group.runs if tasks & run.tasks.keys()]
    scores = {c: group.scores(c.task, c.metric) for c in section.columns if c.task}
    cells = {column: Cell.of(list(of_task.values())) for column, of_task in scores.items() if of_task}
    for mean in section.columns:
        if not mean.task:
            cells[mean] = mean_over_tasks([scores[c] for c in section.part_of(mean) if scores[c]])
    source, target = (tuple(sorted({run.rows_processed[stage] for run in runs})) for stage in (0, 1))
    seeds = tuple(sorted({cell.seeds for column, cell in cells.items() if column.task}))
    return Row("ours", group.label, group.model, group.shots, seeds, source, target, cells)


def _theirs(section: Section, paper: PaperRow) -> Iterable[Row]:
    """The paper's row, if it has a figure for one of the columns."""
    cells = {c: paper.scores[c.task] for c in section.columns if _has(paper, c)}
    if not cells:
        return
    label = paper.method if paper.setting == "single task" else f"{paper.method}, {paper.setting}"
    seeds = (3,) if not paper.quoted else ()
    origin = "quoted" if paper.quoted else "paper"
    row = Row(origin, label, paper.model, paper.shots, seeds, (), (), cells)
    row = _with_means(section, row)
    for mean in [c for c in row.cells if not c.task]:
        whole = len(section.part_of(mean)) == len(benchmarks().get(section.title, ()))
        if whole and section.title in paper.averages:
            row.cells[mean] = Cell(paper.averages[section.title])  # as printed
    yield row


def _has(paper: PaperRow, column: Column) -> bool:
    return column.task in paper.scores and paper.metric(column.task) == column.metric


def _with_means(section: Section, row: Row) -> Row:
    """The row with means over the tasks that it has; none where it has not the CoLA that the mean is with."""
    for mean in [column for column in section.columns if not column.task]:
        part = section.part_of(mean)
        having = [row.cells[c].mean for c in part if c in row.cells]
        if having and all(c in row.cells for c in part if c.doubled):
            row.cells[mean] = Cell(fmean(having))
    return row


def _notes(tasks: Sequence[str], groups: Sequence[Group]) -> list[str]:
    notes = []
    if COLA in tasks:
        notes.append(
            "CoLA stands in two columns: in the paper BMTPT's row is accuracy and the quoted rows beside it are "
            "Matthews correlation, so that their averages over GLUE cannot be compared; compare within a column. "
            "The means stand in two columns likewise."
        )
    if any(row.method in NEVER_RUN for row in _beside(groups)):
        notes.append(
            f"{' and '.join(NEVER_RUN)} are the paper's quoted figures alone: bmtpt_ds does not run these methods."
        )
    if seen := [task for task in tasks if any(_is_source_task(task, g) for g in groups if g.shots == 0)]:
        notes.append(f"{', '.join(seen)}: trained on in the source stage of a row of 0 shots, not unseen tasks.")
    for task in tasks:
        rows = sorted({run.tasks[task]["rows"] for group in groups for run in group.runs if task in run.tasks})
        if len(rows) > 1:
            counts = " and ".join(f"{count:,}" for count in rows)
            notes.append(f"{task}: scored on different rows ({counts}); its figures cannot be compared.")
    named = dict.fromkeys((g.name, g.described) for g in groups if g.name not in ("", g.described))
    notes += [f"{name}: {described}." for name, described in named]
    for label in dict.fromkeys(group.label for group in groups):
        if keys := differing([group for group in groups if group.label == label]):
            notes.append(f"{label}: between models and shots its recipe differs in {', '.join(keys)} too.")
    for model in dict.fromkeys(group.model for group in groups):
        names = sorted({run.results["model"] for g in groups if g.model == model for run in g.runs})
        if len(names) > 1:
            notes.append(f"{model}: taken for one model, though the runs call it {' and '.join(names)}.")
    return notes


def _is_source_task(task: str, group: Group) -> bool:
    """Whether runs that have a score of the task have it among their source tasks."""
    return any(task in run.tasks and task in run.config["source"].get("tasks", []) for run in group.runs)


class Comparison(NamedTuple):
    """A group against a baseline of its model and shots."""

    group: Group
    baseline: Group
    difference: Difference


def comparisons(groups: Sequence[Group], baselines: Sequence[str] = ()) -> list[Comparison]:
    """Every group against each baseline of its model and shots, where they have tasks and seeds in common; of two
    baselines the later one against the earlier one.

    Args:
        baselines: METHOD, METHOD/variant or a run's name each; none: prompt tuning, else runs that began from
            vocabulary rows, and besides every variant of vanilla transfer.

    Raises:
        UserError: no group is called so, or a name stands twice.
    """
    _check_baselines(groups, baselines)
    found = []
    for group in groups:
        beside = [g for g in groups if (g.model, g.shots) == (group.model, group.shots)]
        for against in _named(beside, baselines) if baselines else _usual(beside):
            if against is group:
                break
            difference = paired_difference(*({task: g.scores(task) for task in g.tasks} for g in (group, against)))
            if difference is not None:
                found.append(Comparison(group, against, difference))
    return found


def _check_baselines(groups: Sequence[Group], names: Sequence[str]) -> None:
    labels = list(dict.fromkeys(group.label for group in groups))
    for name in names:
        if name not in labels:
            there_are = f"; there are {', '.join(labels)}"
            raise UserError(f"--baseline {name}: no finished run is of that{nearest(name, labels) or there_are}")
    if again := repeated(names):
        raise UserError(f"--baseline names {again} more than once")


def _named(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    """The groups called so, in the order of the names; some may have runs of other models and shots alone."""
    return [group for name in names for group in groups if group.label == name]


def _usual(groups: Sequence[Group]) -> list[Group]:
    """The baselines where none is named, of groups of one model and number of shots."""
    tuning = [group for group in groups if group.method == BASELINE_METHOD]
    without_source = tuning or [group for group in groups if group.variant.startswith(SCRATCH)]
    first = without_source[:1]  # which may be of vanilla transfer itself
    return first + [group for group in groups if group.method == TRANSFER_METHOD and group not in first]
