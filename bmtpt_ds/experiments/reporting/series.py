"""What the pictures show, as numbers: curves over steps, shots and models, shares of a step."""

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from bmtpt_ds.experiments.reporting.groups import Group, differing, parameters, shots_text
from bmtpt_ds.experiments.reporting.paper import paper_rows
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.experiments.reporting.statistics import Cell, mean_over_tasks

# the median squared distance of two of M particles, of a bandwidth h; `svgd.reference` has the rules
_SQUARED_MEDIAN: dict[str, Callable[[float, int], float]] = {
    "median_log": lambda h, M: h * log(M + 1),
    "median": lambda h, M: h,
    "printed": lambda h, M: (h * log(M + 1)) ** 0.5,
}


class Curve(NamedTuple):
    """Mean scores of one method, at ascending places."""

    label: str
    places: list[float]  # shots, or parameters of the model
    cells: list[Cell]
    tasks: list[str]  # that the means are over: those that every place has
    differing: Sequence[str] = ()  # keys of the recipe in which the places differ too


def metric_lines(run: Run, *keys: str) -> list[tuple]:
    """Of a run's log the steps and the values of some keys, where a line has numbers for all of them, and of `losses`,
    which are the prompts', a list."""
    found = []
    for line in run.lines:
        values = [line.get(key) for key in keys]
        numbers = [n for value in values for n in (value if isinstance(value, list) else [value])]
        lists = [key for key, value in zip(keys, values, strict=True) if isinstance(value, list) and value]
        if lists == [key for key in keys if key == "losses"] and all(isinstance(n, int | float) for n in numbers):
            found.append((line["step"], *values))
    return found


def distances(run: Run) -> list[tuple[int, float]]:
    """Steps and the median distance between two particles, from the bandwidth that followed from it; none where the
    bandwidth was a number of the recipe's, or there is one particle."""
    source = run.config["source"]
    count, rule = source.get("particles", 1), source.get("svgd", {}).get("bandwidth")
    if rule not in _SQUARED_MEDIAN or count < 2:
        return []
    return [(step, _SQUARED_MEDIAN[rule](h, count) ** 0.5) for step, h in metric_lines(run, "bandwidth")]


def shot_curves(groups: Sequence[Group]) -> list[Curve]:
    """Scores against labelled rows, for every method and model with at least two numbers of shots."""
    series: dict[tuple[str, str], list[tuple[float, Group]]] = {}
    for group in groups:
        if group.shots is not None:
            series.setdefault((group.label, group.model), []).append((group.shots, group))
    several = len({model for _, model in series}) > 1
    return _curves({f"{label}, {model}" if several else label: s for (label, model), s in series.items()})


def size_curves(groups: Sequence[Group]) -> list[Curve]:
    """Scores against the model's parameters, for every method, number of shots and family of models (t5, flan-t5, ...)
    with at least two known sizes."""
    series: dict[tuple[str, str], list[tuple[float, Group]]] = {}
    for group in groups:
        size = parameters(group.runs[0].results["model"])
        if size is not None:
            family = group.model.rpartition("-")[0]
            series.setdefault((f"{group.label}, {shots_text(group.shots)}", family), []).append((size, group))
    several = len({family for _, family in series}) > 1
    return _curves({f"{label}, {family}" if several else label: s for (label, family), s in series.items()})


def paper_size_curve(tasks: Sequence[str]) -> Curve | None:
    """BMTPT's scores in the paper against the model's parameters, all rows; None where it lacks one of the tasks."""
    wanted = set(tasks)
    rows = [
        row
        for row in paper_rows()
        if row.method == "bmtpt" and row.shots is None and row.setting == "single task" and wanted <= row.scores.keys()
    ]
    points = sorted((parameters(row.model), fmean(row.scores[task].mean for task in tasks)) for row in rows)
    if len(points) < 2:
        return None
    return Curve("the paper's bmtpt", [size for size, _ in points], [Cell(mean) for _, mean in points], list(tasks))


def _curves(series: dict[str, list[tuple[float, Group]]]) -> list[Curve]:
    curves = []
    for label, points in series.items():
        points.sort(key=lambda point: point[0])
        places = [place for place, _ in points]
        tasks = set.intersection(*(set(group.tasks) for _, group in points))
        if len(set(places)) > 1 and len(set(places)) == len(places) and tasks:
            cells = [mean_over_tasks([group.scores(task) for task in sorted(tasks)]) for _, group in points]
            curves.append(Curve(label, places, cells, sorted(tasks), differing([group for _, group in points])))
    return curves


class Share(NamedTuple):
    """How long the SVGD step takes beside the backward pass."""

    label: str
    ratio: float


def svgd_shares(runs: Sequence[Run], profiles: Sequence[dict]) -> list[Share]:
    """From the logs of source stages, a model each, and from profiles. A log's first line, in which libraries warm up,
    does not count."""
    by_model: dict[str, list[float]] = {}
    for run in runs:
        for step, svgd, backward in metric_lines(run, "seconds_svgd", "seconds_backward"):
            if step > 1 and backward > 0:
                by_model.setdefault(run.model, []).append(svgd / backward)
    shares = [Share(f"{model}\n(runs)", median(ratios)) for model, ratios in by_model.items()]
    for profile in profiles:
        source = profile["stages"].get("source", {})
        if "svgd_over_backward" in source:
            shares.append(Share(f"{Path(profile['model']).name}\n(profile)", source["svgd_over_backward"]))
    return shares
