"""Folders of runs as real ones leave them, with made-up figures: a test compares them with those of a real run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bmtpt_ds.config import override_recipe

MAJORITY = {"cola": 69.1, "mrpc": 68.4, "rte": 52.7, "sst2": 50.9, "stsb": 0.0}


def scores_of(task: str, score: float, rows: int = 100) -> dict[str, Any]:
    """What results.json says of a task."""
    metrics = {"cola": {"accuracy": score, "matthews": score - 50}, "stsb": {"pearson": score, "spearman": score - 1}}
    metrics["multirc"] = {"f1a": score, "exact_match": score / 2}
    found = metrics.get(task, {"accuracy": score})
    majority = MAJORITY.get(task, 50.0)
    return {"metric": next(iter(found)), "score": score, "metrics": found, "majority": majority, "rows": rows}


def write_config(folder: Path, stage: str, settings: Mapping[str, Any], particles: str | None = None) -> None:
    about = {"stage": stage, **({"particles": particles} if particles else {})}
    recipe = override_recipe({}, [f"{key}={json.dumps(value)}" for key, value in settings.items()], "made up")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(about, sort_keys=False) + recipe.to_yaml())


def write_results(folder: Path, file: str = "results.json", **values: Any) -> None:
    results = {"method": "bmtpt", "model": "google-t5/t5-base", "seed": 0, "shots": None, "split": "test"}
    results |= {"rows_processed": {"source": 600, "target": 0}, "trainable_parameters": 76800, "versions": {}}
    results |= {"tasks": {}, "mean": None}
    (folder / file).write_text(json.dumps(results | values, indent=2) + "\n")


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def adapt_run(
    folder: Path,
    scores: Mapping[str, float],
    *,
    seed: int = 0,
    shots: int | None = 16,
    model: str = "google-t5/t5-base",
    particles: str = "runs/source",
    method: str = "bmtpt",
    rows: int = 100,
    budget: tuple[int, int] = (600, 960),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A finished adaptation; `scores`: the headline score of each task."""
    of_run = {"model.name_or_path": model, "run.seed": seed, "target.tasks": list(scores), "target.shots": shots}
    write_config(folder, "adapt", of_run | dict(settings or {}), particles)
    named = {"method": method, "model": model, "seed": seed, "shots": shots}
    named["rows_processed"] = dict(zip(("source", "target"), budget, strict=True))
    tasks = {task: scores_of(task, score, rows) for task, score in scores.items()}
    write_results(folder, **named, tasks=tasks, mean=sum(scores.values()) / len(scores))
    lines = [
        {"step": step, "loss": 2.0 / step, "prior": 0.0, "seconds": 0.5, "peak_memory": 2_000_000_000, "skipped": 0}
        for step in (1, 10, 20)
    ]
    write_lines(folder, [*lines, {"step": 20, "validation": {**scores, "mean": 50.0, "best": 50.0, "best_step": 20}}])
    return folder


def source_run(
    folder: Path,
    *,
    seed: int = 0,
    model: str = "google-t5/t5-base",
    method: str = "bmtpt",
    particles: int = 5,
    steps: int = 2000,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A finished source stage with a log of 1 + steps / 10 lines."""
    of_run = {"model.name_or_path": model, "run.seed": seed, "source.tasks": ["sst2", "cola"]}
    of_run |= {"source.particles": particles, "source.steps": steps, "source.warmup_steps": 1}
    write_config(folder, "source", of_run | dict(settings or {}))
    processed = {"source": steps * particles * 2, "target": 0}
    write_results(folder, method=method, model=model, seed=seed, rows_processed=processed)
    lines = []
    for step in (1, *range(10, steps + 1, 10)):
        losses = [1 + (5 + 0.3 * i) * math.exp(-step / 400) + 0.1 * math.sin(step * (i + 1)) for i in range(particles)]
        of_svgd = {"bandwidth": 3e4, "damping": 0.37, "kernel_mean": 0.25 + 0.1 * (1 - math.exp(-step / 900))}
        of_svgd |= {"drive_norm": 5 * math.exp(-step / 500) + 0.2, "repulsion_norm": 0.01 + 1e-5 * step, "skipped": 0}
        costs = {"seconds": 0.9, "seconds_forward": 0.3, "seconds_backward": 0.5, "seconds_svgd": 0.004 + 1e-7 * step}
        costs |= {"peak_memory": 3_000_000_000}
        lines.append({"step": step, "loss": sum(losses) / particles, "losses": losses, **of_svgd, "lr": 0.3, **costs})
    write_lines(folder, lines)
    return folder


def zero_shot_run(folder: Path, scores: Mapping[str, float], *, shots: int | None = 0, **of_source: Any) -> Path:
    """A finished source stage, by default of ten steps, and the scores of its prompt on tasks without adaptation.

    Args:
        shots: what zero_shot.json says; earlier versions wrote None.
    """
    source_run(folder, **{"steps": 10} | of_source)
    results = json.loads((folder / "results.json").read_text())
    tasks = {task: scores_of(task, score) for task, score in scores.items()}
    own = {"shots": shots, "tasks": tasks, "mean": sum(scores.values()) / len(scores)}
    write_results(folder, "zero_shot.json", **results | own)
    return folder
