"""What a report takes of the files of runs and profiles, looked over: whoever reads it need not doubt it."""

import json
import math
from pathlib import Path
from typing import Any

from bmtpt_ds.errors import UserError
from bmtpt_ds.run_files import read_config

# of results.json and its like, what a report needs
_KINDS = {"method": str, "model": str, "seed": int, "shots": int | None, "rows_processed": dict, "tasks": dict}
# of config.yaml: what kind of value, and what stands for none
_ASKED = {
    "source.tasks": (list, []),
    "source.svgd": (dict, {}),
    "run.name": (str | None, None),
    "particles": (str, "none"),
}
_TASK_KEYS = ("metric", "score", "metrics", "majority", "rows")


def read_sections(file: Path) -> dict[str, Any]:
    """As `read_config`, of a whole recipe.

    Raises:
        UserError: a section is missing too, or what a report asks of it is something else.
    """
    config = read_config(file)
    for section in ("model", "source", "target", "run"):
        if not isinstance(config.get(section), dict):
            raise UserError(f"{file}: no section {section!r}")
    for name, (kind, default) in _ASKED.items():
        *sections, key = name.split(".")
        value = (config[sections[0]] if sections else config).get(key, default)
        if not isinstance(value, kind):
            raise UserError(f"{file}: {name} is {value!r}")
    return config


def read_results(file: Path) -> dict[str, Any]:
    """A run's results.json, or another file that is written like it.

    Raises:
        UserError: unreadable, no JSON, a key missing, a score that is no number.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file.name} is no object")
    missing = [key for key in _KINDS if key not in values]
    if missing:
        raise UserError(f"{file.name} has no {missing[0]!r}")
    for name, kind in _KINDS.items():
        if not isinstance(values[name], kind):
            raise UserError(f"{file.name}: {name!r} is {values[name]!r}")
    if not all(isinstance(values["rows_processed"].get(stage), int) for stage in ("source", "target")):
        raise UserError(f"{file.name}: 'rows_processed' lacks a stage")
    for task, scores in values["tasks"].items():
        _check_task(file.name, task, scores)
    return values


def _check_task(file: str, task: str, scores: Any) -> None:
    missing = [key for key in _TASK_KEYS if not isinstance(scores, dict) or key not in scores]
    if missing:
        raise UserError(f"{file}: {task} has no {missing[0]!r}")
    metrics = scores["metrics"]
    if not isinstance(metrics, dict) or scores["metric"] not in metrics:
        raise UserError(f"{file}: metrics of {task} is {metrics!r}")
    numbers = {**metrics, "score": scores["score"], "majority": scores["majority"], "rows": scores["rows"]}
    strange = [name for name, value in numbers.items() if not (isinstance(value, int | float) and math.isfinite(value))]
    if strange:
        raise UserError(f"{file}: {strange[0]} of {task} is {numbers[strange[0]]!r}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The sound lines of a metrics.jsonl; none where there is no such file."""
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def is_profile(profile: Any) -> bool:
    """Whether it has what a report takes of a profile."""
    if not isinstance(profile, dict) or not isinstance(profile.get("model"), str):
        return False
    stages = profile.get("stages")
    source = stages.get("source", {}) if isinstance(stages, dict) else None
    return isinstance(source, dict) and isinstance(source.get("svgd_over_backward", 0.0), int | float)
