"""results.json, and the table that a person reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from bmtpt_ds.config import Recipe
from bmtpt_ds.evaluate import TaskScore
from bmtpt_ds.files import write_atomically
from bmtpt_ds.readable import mean_and_spread
from bmtpt_ds.session import Session, versions


def write_results(
    path: Path,
    session: Session,
    processed: dict[str, int],
    trainable_parameters: int,
    *,
    shots: int | None = None,
    split: str | None = None,
    scores: dict[str, TaskScore] | None = None,
) -> None:
    """Writes results.json; in a run's directory it is written last, so that it says that the run is finished.

    Args:
        processed: rows times prompts that the backbone saw in training, of `source` and of `target`.
        scores: by task, 0 to 100; none for a source run.
    """
    scores = scores or {}
    results = {
        "method": session.recipe.method,
        "model": session.recipe.model.name_or_path,
        "seed": session.recipe.run.seed,
        "shots": shots,
        "split": split,
        "rows_processed": processed,
        "trainable_parameters": trainable_parameters,
        "versions": versions(),
        "tasks": {name: s.as_json() for name, s in scores.items()},
        "mean": sum(s.score for s in scores.values()) / len(scores) if scores else None,
    }
    write_atomically(path, (json.dumps(results, indent=2) + "\n").encode())


def write_results_of_runs(path: Path, recipe: Recipe, files: Sequence[Path]) -> None:
    """Writes the results.json of runs side by side: of each task the mean of its runs, `std` and each `scores`.

    Args:
        files: the runs' own; all in folders of their names.
    """
    runs = [json.loads(file.read_text()) for file in files]
    tasks = {}
    for name in dict.fromkeys(task for run in runs for task in run["tasks"]):
        of_task = [run["tasks"][name] for run in runs if name in run["tasks"]]
        scores = [found["score"] for found in of_task]
        metrics = {metric: fmean(found["metrics"][metric] for found in of_task) for metric in of_task[0]["metrics"]}
        spread = {"std": stdev(scores) if len(scores) > 1 else None, "scores": scores}
        tasks[name] = of_task[0] | {"score": fmean(scores), "metrics": metrics} | spread
    results = runs[0] | {
        "seed": None,
        "seeds": recipe.target.seeds,
        "rows_processed": {
            "source": runs[0]["rows_processed"]["source"],  # once, for all of them
            "target": sum(run["rows_processed"]["target"] for run in runs),
        },
        "trainable_parameters": sum(run["trainable_parameters"] for run in runs),
        "tasks": tasks,
        "mean": fmean(task["score"] for task in tasks.values()),
        "runs": [file.parent.name for file in files],
    }
    write_atomically(path, (json.dumps(results, indent=2) + "\n").encode())


def table_of_runs(scores: Sequence[dict[str, TaskScore]], split: str) -> str:
    """A line a task of runs side by side: mean and sample standard deviation of the headline over its runs."""
    lines = [f"{'task':<12} {'runs':>4} {'rows':>6}  majority  {split}"]
    for name in dict.fromkeys(task for of_run in scores for task in of_run):
        of_task = [of_run[name] for of_run in scores if name in of_run]
        values, first = [s.score for s in of_task], of_task[0]
        figures = f"{first.majority:>8.1f}  {first.metric} {mean_and_spread(values)}"
        lines.append(f"{name:<12} {len(values):>4} {first.rows:>6}  {figures}")
    return "\n".join(lines)


def score_table(scores: dict[str, TaskScore], split: str) -> str:
    """A line a task: the scores beside what always giving the most frequent answer would give."""
    lines = [f"{'task':<12} {'rows':>6}  majority  {split}"]
    for name, s in scores.items():
        metrics = "  ".join(f"{metric} {value:.1f}" for metric, value in s.metrics.items())
        lines.append(f"{name:<12} {s.rows:>6}  {s.majority:>8.1f}  {metrics}")
    return "\n".join(lines)


def beside_majority(scores: Mapping[str, TaskScore]) -> dict[str, dict[str, float]]:
    """What a validation's line in metrics.jsonl holds, by task and their mean: scores, and beside them what always
    giving the most frequent answer would score."""
    columns = {
        "validation": {task: score.score for task, score in scores.items()},
        "majority": {task: score.majority for task, score in scores.items()},
    }
    return {name: values | {"mean": fmean(values.values())} for name, values in columns.items()}
