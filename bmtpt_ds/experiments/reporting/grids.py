"""The report's tables as text cells, whatever they are written in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from bmtpt_ds.experiments.reporting.groups import shots_text
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.experiments.reporting.series import metric_lines
from bmtpt_ds.experiments.reporting.statistics import LEVEL, RESAMPLES, Cell
from bmtpt_ds.experiments.reporting.summary import Summary
from bmtpt_ds.experiments.reporting.tables import Column, Comparison, Row, Section
from bmtpt_ds.readable import plus_minus, readable_bytes

NONE = "–"  # a cell without a figure


@dataclass(frozen=True)
class Grid:
    """A table of texts; all rows are as long as the header."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: int = 3  # leading columns that are words; the others are figures


def summary_grid(summary: Summary) -> Grid:
    """A column a number of shots; a score is the mean over tasks ± the sample standard deviation over seeds."""
    shots = map(shots_text, summary.shots)
    header = ["method", "model", "tasks", "seeds", *shots, "source rows processed"]
    rows = []
    for line in summary.lines:
        cells = [line.cells.get(count) for count in summary.shots]
        seeds = sorted({cell.seeds for cell in cells if cell and cell.seeds})
        row = [line.label, line.model or NONE, str(len(line.tasks)), _ends(seeds), *map(_figure, cells)]
        rows.append([*row, _ends(line.rows_source)])
    metrics = "in the tasks' headline metrics"
    notes = [f"Means over {', '.join(sorted(summary.lines[0].tasks))}, {metrics}."]
    if not summary.comparable:
        notes = [f"Means over each line's tasks, {metrics}: lines of different tasks cannot be compared."]
    return Grid("All tasks", header, rows, notes, words=2)


def score_grid(section: Section) -> Grid:
    """A section; a score is its mean ± the sample standard deviation over seeds."""
    header = ["from", "method", "model", "shots", "seeds", *(c.heading for c in section.columns), "rows processed"]
    return Grid(section.title, header, [_score_row(section, row) for row in section.rows], section.notes)


def _score_row(section: Section, row: Row) -> list[str]:
    shots = _shots(row.shots) if row.model else NONE
    seeds = _ends(row.seeds)
    budget = f"{_ends(row.rows_source)} / {_ends(row.rows_target)}" if row.rows_target else NONE
    cells = [_score(section, row, column) for column in section.columns]
    return [row.origin, row.label, row.model or NONE, shots, seeds, *cells, budget]


def _shots(shots: int | None) -> str:
    return "all" if shots is None else str(shots)


def _ends(counts: Sequence[int]) -> str:
    """Of ascending ones the first and the last."""
    return " to ".join(dict.fromkeys(f"{n:,}" for n in (*counts[:1], *counts[-1:]))) or NONE


def _figure(cell: Cell | None) -> str:
    return plus_minus(cell.mean, cell.std) if cell else NONE


def _score(section: Section, row: Row, column: Column) -> str:
    cell = row.cells.get(column)
    text = _figure(cell)
    if cell is None:
        return text
    if column.task:
        return f"{text} ({cell.seeds})" if len(row.seeds) > 1 else text
    part = section.part_of(column)
    having = sum(c in row.cells for c in part)
    return text if having == len(part) else f"{text} ({having} of {len(part)})"


def difference_grid(comparisons: Sequence[Comparison]) -> Grid:
    """Paired differences in points."""
    header = ["method", "against", "model", "shots", "pairs", "difference", f"{LEVEL:.0%} interval"]
    header.append("wins / ties / losses")
    rows = []
    for group, baseline, found in comparisons:
        interval = NONE if found.interval is None else "{:+.1f} to {:+.1f}".format(*found.interval)
        shots, counts = _shots(group.shots), f"{found.wins} / {found.ties} / {found.losses}"
        row = [group.label, baseline.label, group.model, shots, str(found.pairs), f"{found.mean:+.1f}", interval]
        rows.append([*row, counts])
    notes = [
        "Points of the tasks' headline metrics, over the pairs of the same task and seed: mean over tasks of the mean "
        "over a task's pairs. Interval: hierarchical bootstrap, tasks drawn first, then the pairs of each; percentiles "
        f"of {RESAMPLES:,} resamples. From few tasks or seeds such an interval is too narrow."
    ]
    return Grid("Paired differences", header, rows, notes)


def source_grid(runs: Sequence[Run]) -> Grid:
    """The source stages."""
    header = ["run", "method", "model", "seed", "prompts", "steps", "rows processed", "last loss", "of prompts"]
    header += ["validation", "majority", "s a step", "peak memory"]
    rows = []
    for run in runs:
        source, lines = run.config["source"], metric_lines(run, "loss", "losses")
        loss = between = NONE
        if lines:
            _, mean, losses = lines[-1]
            loss, between = f"{mean:.3f}", f"{min(losses):.3f} to {max(losses):.3f}"
        counts = [_count(run.prompts), _count(source.get("steps"))]
        row = [str(run.path), run.method, run.model, str(run.seed), *counts]
        rows.append([*row, _count(run.rows_processed[0]), loss, between, *_validation(run), *_costs(run)])
    notes = [
        "Loss: mean since the line of the log before the last, over tasks and prompts (particles, or of other methods "
        "a prompt a task); then the prompts' own. Validation: mean over the source tasks of what the prompt (of "
        "particles their mean) scores on their validation rows after the last step; majority: the majority class. "
        "Seconds: median over the log's lines, the first left out. Memory: of rank 0, its tensors on a GPU, the "
        "process on a CPU."
    ]
    return Grid("Source stages", header, rows, notes)


def _validation(run: Run) -> list[str]:
    """The mean scores of the last validation and of the majority class, as texts."""
    last = run.validations[-1] if run.validations else {}
    scores = [last.get(name) for name in ("validation", "majority")]
    means = [of_tasks.get("mean") if isinstance(of_tasks, dict) else None for of_tasks in scores]
    return [f"{mean:.1f}" if isinstance(mean, int | float) else NONE for mean in means]


def _costs(run: Run) -> list[str]:
    """Seconds of a step and peak memory, as texts."""
    seconds = [value for step, value in metric_lines(run, "seconds") if step > 1]
    memory = [value for _, value in metric_lines(run, "peak_memory")]
    return [f"{median(seconds):.3g}" if seconds else NONE, readable_bytes(max(memory)) if memory else NONE]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else NONE
