"""What a run leaves in its directory: names of the files, and what config.yaml says. Needs no torch."""

from pathlib import Path

from bmtpt_ds.config import RunConfig
from bmtpt_ds.config.recipe import STAGES, recipe_part
from bmtpt_ds.config.yaml_text import parse_yaml
from bmtpt_ds.errors import UserError

CONFIG, METRICS, RESULTS = "config.yaml", "metrics.jsonl", "results.json"
ZERO_SHOT = "zero_shot.json"  # of a source stage: its prompt's scores without adaptation, as `bmtpt scale` has them
PARTICLES, PROMPT = "particles.safetensors", "prompt.safetensors"
RUNS = "runs"  # of several runs side by side: a directory of each
PARTS = ("teachers", "probe")  # of methods whose stage has a part before it: MPT's teachers, SPoT's probe
# what may differ when a run goes on: it changes how it runs, not what it computes
FREE = (
    *(f"run.{key}" for key in RunConfig.model_fields if key != "seed"),
    "evaluate",
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
