"""What came out of a grid: accuracy, speed and memory of each model and variant."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median

from bmtpt_ds.experiments.reporting.groups import parameters
from bmtpt_ds.experiments.reporting.records import read_lines
from bmtpt_ds.experiments.scaling.jobs import Job, scores_of
from bmtpt_ds.readable import mean_and_spread, readable_bytes, short_time
from bmtpt_ds.run_files import METRICS, ZERO_SHOT


def table(jobs: Sequence[Job]) -> str:
    """A line a model, variant and number of shots over the seeds that are finished: the mean score of the target tasks,
    seconds of a step and peak memory of a rank (the first one) in both stages."""
    groups: dict[tuple[str, str, str], list[Job]] = {}
    for job in jobs:
        if job.stage == "adapt" and job.finished:
            member = job.member
            groups.setdefault((member.model, member.variant, member.shots), []).append(job)
    if not groups:
        return "No member is finished yet."
    zero_shot = any(_zero_shot(job) is not None for of_group in groups.values() for job in of_group)
    several = ["shots"] if any(shots for _, _, shots in groups) else []
    heads = ["model", "parameters", "variant", *several, "seeds", *(["0 shots"] if zero_shot else []), "score"]
    rows = [[*heads, "source step", "memory", "target step", "memory"]]
    for (model, variant, shots), of_group in groups.items():
        row = [Path(model).name, _parameters(model), variant or "-", *([shots] if several else []), str(len(of_group))]
        if zero_shot:
            row.append(_mean(_zero_shot(job) for job in of_group))
        row.append(_mean(_score(job.outcome) for job in of_group))
        for stages in ([job.needs for job in of_group if job.needs], of_group):
            row += _costs([job.outcome.parent / METRICS for job in stages])
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "score: mean of the tasks' headline metrics on the test rows, 0 to 100; ± over seeds"])


def _score(file: Path) -> float | None:
    """None of a damaged file, which the report beside the table names, and where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["mean"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _zero_shot(job: Job) -> float | None:
    """Of its own target tasks: members that share the source stage may have others."""
    scores = scores_of(job.needs.outcome.with_name(ZERO_SHOT)) if job.needs else {}
    own = [scores.get(name) for name in job.member.recipe.target.tasks]
    return None if None in own else fmean(own)


def _mean(scores: Iterable[float | None]) -> str:
    """Over the seeds that have a score."""
    values = [score for score in scores if score is not None]
    return mean_and_spread(values) if values else "-"


def _costs(files: Sequence[Path]) -> list[str]:
    """Median seconds of a step and the greatest memory in the runs' metrics."""
    lines = [line for file in files for line in read_lines(file)]
    seconds = [line["seconds"] for line in lines if line.get("seconds") and line["step"] > 1]
    memory = [line["peak_memory"] for line in lines if line.get("peak_memory")]
    return [short_time(median(seconds)) if seconds else "-", readable_bytes(max(memory)) if memory else "-"]


def _parameters(model: str) -> str:
    size = parameters(model)
    return f"{size / 1e6:,.1f} M" if size else "-"
