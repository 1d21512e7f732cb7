"""What a run leaves in its directory: names of the files, and what config.yaml says. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmtpt_ds.config import Recipe, RunConfig
from bmtpt_ds.config.recipe import STAGES, recipe_part
from bmtpt_ds.config.yaml_text import parse_yaml, yaml_of
from bmtpt_ds.errors import UserError

CONFIG, METRICS, RESULTS = "config.yaml", "metrics.jsonl", "results.json"
ZERO_SHOT = "zero_shot.json"  # of a source stage: its prompt's scores without adaptation, as `bmtpt scale` has them
PARTICLES, PROMPT = "particles.safetensors", "prompt.safetensors"
RUNS = "runs"  # of several runs side by side: a directory of each
PARTS = ("teachers", "probe")  # of methods whose stage has a part before it: MPT's teachers, SPoT's probe
# what may differ when a run goes on: it changes how it runs, not what it computes
FREE = (
    *(f"run.{key}" for key in RunConfig.model_fields if key != "seed"),
    "evaluate.batch_size",  # not scoring: the best step is chosen by it
    "model.cuda_graphs",
    "source.particle_ranks",
    "source.svgd.backend",
)


class Foreign(UserError):
    """A config.yaml that no run of ours has written."""


def read_run_recipe(path: Path) -> tuple[str, dict]:
    """The stage (`source` or `adapt`) and the resolved recipe, as plain values, of a run's directory.

    Raises:
        UserError: not a run's directory.
    """
    config = path / CONFIG
    if not config.is_file():
        why, run = f"no {CONFIG} in it", "the folder that was a run's --run-dir"
        if path.is_file():
            why, run = "a file", f"its folder, {path.parent}" if (path.parent / CONFIG).is_file() else run
        raise UserError(f"{path}: not a run's directory ({why}); give {run}")
    values = read_config(config)
    return values["stage"], recipe_part(values)


def started_from(path: Path) -> str | None:
    """What `--particles` named in a run of `adapt`; None of another run, and of an imported one."""
    return read_config(path / CONFIG).get("particles")


def read_config(file: Path) -> dict:
    """What stands in a config.yaml: `stage`, for adapt `particles`, and the resolved recipe, as plain values.

    Raises:
        Foreign: not written by a run.
        UserError: unreadable, no YAML.
    """
    try:
        values = parse_yaml(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("stage") not in STAGES:
        raise Foreign(f"{file}: not written by bmtpt; give another folder")
    return values


def differing_keys(path: Path, now: Mapping[str, Any]) -> list[str]:
    """What of these values of a recipe, or of the run beside it, is not as a run's directory has it; keys that may
    differ when a run goes on left out. Of a section all keys that differ, and no other section.

    Raises:
        UserError: as `read_config`.
    """
    was = _without_free(_completed(read_config(path / CONFIG), Recipe().model_dump(mode="json")))
    for section, values in _without_free(now).items():
        before = was.get(section)
        if _same(before, values):
            continue
        if isinstance(values, dict) and isinstance(before, dict):
            both = {**values, **before}
            keys = [f"{section}.{key}" for key in both if not _same(before.get(key), values.get(key))]
            return keys or [section]  # the same in another order
        return [section]
    return []


def _without_free(values: Mapping, above: str = "") -> dict:
    """A run's recipe but for what may differ when it goes on."""
    kept = {key: value for key, value in values.items() if f"{above}{key}" not in FREE}
    return {k: _without_free(v, f"{above}{k}.") if isinstance(v, dict) else v for k, v in kept.items()}


def _completed(values: dict, defaults: dict) -> dict:
    """A run's recipe with the defaults of keys that there were not yet when it was written: they mean what it did."""
    own = {}
    for key, value in values.items():
        default = defaults.get(key)
        own[key] = _completed(value, default) if isinstance(value, dict) and isinstance(default, dict) else value
    return {**defaults, **own}


def _same(before: object, now: object) -> bool:
    """Also in the order of their keys: that of an own task's fields is the order of its text."""
    return yaml_of(before) == yaml_of(now)
