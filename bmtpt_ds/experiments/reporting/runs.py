"""Runs as they lie in folders: finished, unfinished, damaged, or none of ours. Of a run its text files are read."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bmtpt_ds.config.methods import SOURCE_KIND
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.planning.cluster import PROFILE
from bmtpt_ds.experiments.reporting.records import is_profile, read_lines, read_results, read_sections
from bmtpt_ds.run_files import CONFIG, METRICS, RESULTS, RUNS, ZERO_SHOT, Foreign, read_config


@dataclass(frozen=True)
class Run:
    """A finished run of either stage, or the scores of a source run's prompt on tasks that it was not adapted to."""

    path: Path  # as it was given or found
    stage: str  # source, adapt, or zero_shot
    config: dict[str, Any]  # the resolved recipe
    particles: str | None  # of the others than source: where they came from, `none` for vocabulary rows
    results: dict[str, Any]  # results.json, of zero_shot what zero_shot.json says

    @property
    def method(self) -> str:
        return self.results["method"]

    @property
    def model(self) -> str:
        """Its name without owner or folder: the same model lies in different places."""
        return Path(self.results["model"]).name

    @property
    def shots(self) -> int | None:
        # files of before `evaluate` wrote the 0 have null, which is all rows elsewhere
        return 0 if self.stage == "zero_shot" else self.results["shots"]

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """By task: metric, score, metrics, majority, rows; empty for a source run."""
        return self.results["tasks"]

    @property
    def prompts(self) -> int | None:
        """How many its source stage trains: particles, or of another method a prompt a task, or one for all."""
        source = self.config.get("source", {})
        counts = {"particles": source.get("particles"), "a prompt a task": len(source.get("tasks", []))}
        return counts.get(SOURCE_KIND.get(self.method), 1)

    @property
    def multi(self) -> bool:
        """Whether its tasks were adapted to together."""
        return bool(self.config.get("target", {}).get("multi"))

    @property
    def rows_processed(self) -> tuple[int, int]:
        """Rows times prompts that the backbone saw in training, in the source and in the target stage."""
        processed = self.results["rows_processed"]
        return processed["source"], processed["target"]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are losses, not validations; what a kill or a disk has torn is left out."""
        return [line for line in self._log if "validation" not in line]

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """The other ones: scores by task, and beside them those of the majority class."""
        return [line for line in self._log if "validation" in line]

    @cached_property
    def _log(self) -> list[dict[str, Any]]:
        return read_lines(self.path / METRICS)


@dataclass
class Found:
    """What lies in the folders that were named."""

    runs: list[Run] = field(default_factory=list)
    profiles: list[dict] = field(default_factory=list)  # what `bmtpt profile --json` has written of each model
    unfinished: list[str] = field(default_factory=list)  # a line each
    damaged: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def rest(self) -> list[str]:
        """A line for everything that is not in the tables."""
        return [*self.unfinished, *self.damaged, *self.foreign]


def find_runs(places: Sequence[Path]) -> Found:
    """Reads all runs in the given places.

    Args:
        places: runs, folders that hold runs at any depth, JSON files of `bmtpt profile`. A folder that is no run's is
            named among the foreign ones if it was given, and passed over where it was found in another.

    Raises:
        UserError: a place that does not exist.
    """
    found, seen = Found(), set()
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such folder; give run directories, or folders that hold some")
        if place.is_file():
            _read_file(place, found)
            continue
        before = len(found.rest)
        runs = [folder for folder in _folders(place, found) if folder.resolve() in seen or _read_folder(folder, found)]
        seen |= {folder.resolve() for folder in runs}
        if not runs and len(found.rest) == before:
            found.foreign.append(f"{place}: no run of bmtpt, and none in it")
    return found


def _folders(place: Path, found: Found) -> Iterator[Path]:
    """The folders at and below a place that may be runs, in the order of their names. In a run's own folder only those
    of runs side by side are looked for."""

    def refused(error: OSError) -> None:
        found.damaged.append(f"{error.filename}: cannot be looked into: {error.strerror}")

    for name, folders, files in os.walk(place, onerror=refused):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        if not {CONFIG, RESULTS} & set(files):
            continue
        folder = Path(name)
        if not _is_foreign(folder):
            folders[:] = [RUNS] if RUNS in folders else []
        yield folder


def _is_foreign(folder: Path) -> bool:
    """Whether a config.yaml or results.json is of another program."""
    try:
        read_config(folder / CONFIG)
    except Foreign:
        return not (folder / METRICS).is_file()
    except UserError:
        return not (folder / CONFIG).is_file() and not (folder / METRICS).is_file()
    return False


def _read_file(file: Path, found: Found) -> None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if isinstance(values, dict) and values.get("format") == PROFILE:
        profiles = values.get("profiles")
        if isinstance(profiles, list) and all(is_profile(profile) for profile in profiles):
            found.profiles += profiles
        else:
            found.damaged.append(f"{file}: damaged: a profile, but not a whole one")
        return
    of_run = file.name in (CONFIG, METRICS, RESULTS, ZERO_SHOT)
    mend = f"; give its folder, {file.parent}" if of_run else ""
    found.foreign.append(f"{file}: neither a run's folder nor a JSON of `bmtpt profile`{mend}")


def _read_folder(folder: Path, found: Found) -> bool:
    """Reads what may be a run into `found`; whether it was one, in whatever state."""
    if _is_foreign(folder):
        return False
    try:
        config = read_sections(folder / CONFIG)
    except UserError as error:
        found.damaged.append(f"{folder}: damaged: {str(error).removeprefix(f'{folder}/')}")
        return True
    stage, particles = config.pop("stage"), config.pop("particles", None)
    several = stage == "adapt" and config["target"].get("seeds") is not None
    results = folder / RESULTS
    if not results.is_file():
        _tell_unfinished(folder, config["source" if stage == "source" else "target"], several, found)
    elif not several:  # a summary of runs side by side stands above their own results, which count
        _add_run(found, results, stage, config, particles)
        if stage == "source" and (folder / ZERO_SHOT).is_file():
            _add_run(found, folder / ZERO_SHOT, "zero_shot", config, str(folder))
    elif not (folder / RUNS).is_dir():
        found.damaged.append(f"{folder}: damaged: {RUNS}/ with the runs side by side is missing")
    return True


def _add_run(found: Found, results: Path, stage: str, config: dict[str, Any], particles: str | None) -> None:
    folder = results.parent
    try:
        values = read_results(results)
        if values.get("split") not in (None, "test"):
            mend = "score it again with --split test"
            raise UserError(f"{results.name} is of {values['split']} rows, a report compares test rows; {mend}")
        found.runs.append(Run(folder, stage, config, particles, values))
    except UserError as error:
        found.damaged.append(f"{folder}: damaged: {error}")


def _tell_unfinished(folder: Path, section: dict, several: bool, found: Found) -> None:
    if folder.parent.name == RUNS and _is_several(folder.parent.parent):
        if (folder.parent.parent / RESULTS).is_file():
            found.damaged.append(f"{folder}: damaged: {RESULTS} is missing, though the runs side by side have ended")
        return  # else the folder above says it for all of them
    lines = read_lines(folder / METRICS)
    step, steps = max((line["step"] for line in lines), default=0), section.get("steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    what = f"{'runs side by side, ' * several}step {step:,}{of} in its log"
    if several and not lines and (folder / RUNS).is_dir():  # of tuned weights: one run after another, each with its log
        done = sum((run / RESULTS).is_file() for run in (folder / RUNS).iterdir())
        what = f"{done} of its runs {'are' if done != 1 else 'is'} finished"
    found.unfinished.append(f"{folder}: unfinished: {what}; go on with the command that began it and --resume")


def _is_several(folder: Path) -> bool:
    try:
        return read_sections(folder / CONFIG)["target"].get("seeds") is not None
    except UserError:
        return False
