"""`bmtpt export`: the prompts of a finished run as PEFT adapters, each with a model card."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.config import Recipe, override_recipe
from bmtpt_ds.config.methods import TUNES_WEIGHTS
from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.export.adapter import CONFIG_FILE, WEIGHTS_FILE, weights_sha256, write_adapter
from bmtpt_ds.export.card import CARD, Card, model_card
from bmtpt_ds.export.record import RECORD, Record, write_record
from bmtpt_ds.files import write_atomically
from bmtpt_ds.folders import check_out, draft_of
from bmtpt_ds.hub import cached_model
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.model.shapes import architecture_by_name
from bmtpt_ds.model_folder import Architecture, local_folder, read_architecture
from bmtpt_ds.prompt_files import prompt_for, read_run
from bmtpt_ds.quiet import is_first_rank, say
from bmtpt_ds.run_files import RESULTS, read_run_recipe, started_from
from bmtpt_ds.tasks import get_task

_FILES = {CONFIG_FILE, WEIGHTS_FILE, CARD, RECORD}
UNKNOWN_LICENSE = "unknown"  # the hub's word where nothing is said


@dataclass(frozen=True)
class _Run:
    """A finished run."""

    folder: Path
    stage: str  # `source` or `adapt`
    recipe: Recipe
    stored: Stored
    results: dict[str, Any] | None


@dataclass(frozen=True)
class _Part:
    """An adapter to be written."""

    subfolder: str  # below --out; "" is --out itself
    tasks: list[str]
    prompt: torch.Tensor | ComposedPrompt  # [L, H], or by the number of the task


def run_export(
    prompt_dir: Path,
    out: Path,
    names: Sequence[str],
    base_model: str | None,
    license_name: str,
    *,
    composed: bool,
    overwrite: bool,
) -> None:
    """Writes a run's prompts into `out`, which appears when it is complete.

    A run of `adapt` becomes one MULTITASK_PROMPT_TUNING adapter of rank 1, its tasks in their order; `composed` writes
    a PROMPT_TUNING adapter a task in its place, of several tasks in subfolders of their names. A run of `source`
    becomes PROMPT_TUNING: its particles' mean.

    Args:
        names: tasks, in the order of their numbers; default: the run's.
        base_model: what the adapter names as its base; default: the run's model.name_or_path.
        license_name: of the model card, as the hub abbreviates it.

    Raises:
        UserError: no finished run, another run's task, an `out` whose files would be lost; nothing is written.
    """
    if not is_first_rank():
        return
    run = _read_run(prompt_dir)
    parts = _parts(run, names, composed=composed)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license_name):
        raise UserError(f"--license {license_name!r}: not like the hub's identifiers (apache-2.0, cc-by-4.0); mend it")
    check_out(out, "export", "an export", mark=_is_export, own=_is_own, overwrite=overwrite)
    base = base_model or run.recipe.model.name_or_path
    architecture = _architecture(run)
    with draft_of(out) as draft:
        for part in parts:
            folder = draft / part.subfolder
            folder.mkdir(exist_ok=True)
            write_adapter(folder, part.prompt, base, architecture)
            record = _record(run, part, weights_sha256(folder))
            card = Card(base, license_name, record, isinstance(part.prompt, ComposedPrompt))
            write_record(folder, record)
            write_atomically(folder / CARD, model_card(card).encode())
    for part in parts:
        kind = "MULTITASK_PROMPT_TUNING" if isinstance(part.prompt, ComposedPrompt) else "PROMPT_TUNING"
        say(f"export: {out / part.subfolder}: {kind}, {', '.join(part.tasks) or 'no task of its own'}")
    if Path(base).is_dir():
        hint = "before it is shared, export it with --base-model OWNER/NAME (bmtpt.json keeps the recipe as it was)"
        say(f"export: the adapter names the folder {base} as its base model; {hint}")


def _read_run(folder: Path) -> _Run:
    stage, values = read_run_recipe(folder)
    recipe, file = override_recipe(values, [], str(folder)), folder / RESULTS
    if stage == "adapt" and recipe.method in ("attempt", *TUNES_WEIGHTS):
        raise UserError(f"{folder}: of method {recipe.method}, which leaves no plain prompt; export knows those alone")
    stored = read_run(folder, stage)
    results = None
    if file.is_file():  # an imported run has none
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            for task in results["tasks"].values():
                task["metric"], task["score"], task["majority"], task["rows"], task["metrics"].items()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file}: not as a run writes it; copy the run again, or move that file away") from None
    return _Run(folder, stage, recipe, stored, results)


def _parts(run: _Run, names: Sequence[str], *, composed: bool) -> list[_Part]:
    if run.stage == "source":
        if names:
            raise UserError(f"--task: {run.folder} is a run of `bmtpt source`, whose prompt is of no single task")
        return [_Part("", [], prompt_for(run.stored, ""))]
    own = run.stored.state["tasks"]
    chosen = list(dict.fromkeys(names)) or own
    for name in chosen:
        if name not in own:
            theirs = f"the prompt in {run.folder} is for {', '.join(own)}"
            raise UserError(f"--task {name}: {theirs}{nearest(name, own)}")
        get_task(name, run.recipe.data.tasks)
    if composed:
        return [_Part(name if len(chosen) > 1 else "", [name], prompt_for(run.stored, name)) for name in chosen]
    tensors = run.stored.tensors
    a, b = (torch.stack([tensors[f"{name}.{which}"] for name in chosen]) for which in ("a", "b"))
    return [_Part("", chosen, ComposedPrompt(tensors["full"], a, b))]


def _record(run: _Run, part: _Part, weights: str) -> Record:
    """Of the part alone: other tasks' scores are not its own."""
    whole = isinstance(part.prompt, ComposedPrompt)
    results, recipe, state = run.results, run.recipe.model_dump(mode="json"), run.stored.state
    if run.stage == "adapt" and part.tasks != run.stored.state["tasks"]:
        recipe["target"] |= {"tasks": part.tasks}
        state = state | {"tasks": part.tasks}
        if results:
            of_part = {name: score for name, score in results["tasks"].items() if name in part.tasks}
            mean = sum(score["score"] for score in of_part.values()) / len(of_part) if of_part else None
            results = results | {"tasks": of_part, "mean": mean}
    tasks = part.tasks or state["tasks"]
    began = started_from(run.folder)
    return Record(
        stage=run.stage,
        tasks=tasks,
        whole=whole,
        from_particles=None if began is None else began != "none",
        recipe=recipe,
        state=state,
        results=results,
        weights_sha256=weights,
    )


def _architecture(run: _Run) -> Architecture | None:
    """Of the run's model, if it can be told without a network: PEFT writes two of its sizes, and reads neither."""
    name = run.recipe.model.name_or_path
    try:
        folder = local_folder(name) or cached_model(name, weights=False)
        return read_architecture(folder) if folder else architecture_by_name(name)
    except UserError:
        return None


def _is_export(folder: Path) -> bool:
    return (folder / RECORD).is_file() or any(folder.glob(f"*/{RECORD}"))


def _is_own(name: Path, path: Path) -> bool:
    if path.is_dir():
        return len(name.parts) == 1 and (path / RECORD).is_file()
    return len(name.parts) <= 2 and name.name in _FILES
