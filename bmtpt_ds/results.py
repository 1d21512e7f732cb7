"""results.json, and the table that a person reads."""

import json
from pathlib import Path

from bmtpt_ds.checkpoint import write_atomically
from bmtpt_ds.evaluate import TaskScore
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


def score_table(scores: dict[str, TaskScore], split: str) -> str:
    """A line a task: the scores beside what always giving the most frequent answer would give."""
    lines = [f"{'task':<12} {'rows':>6}  majority  {split}"]
    for name, s in scores.items():
        metrics = "  ".join(f"{metric} {value:.1f}" for metric, value in s.metrics.items())
        lines.append(f"{name:<12} {s.rows:>6}  {s.majority:>8.1f}  {metrics}")
    return "\n".join(lines)
