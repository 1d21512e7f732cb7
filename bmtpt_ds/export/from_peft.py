"""`bmtpt import`: prompts of PEFT adapters, whoever made them, as a run's folder that the other commands take."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from bmtpt_ds.checkpoint import Stored, write_tensors
from bmtpt_ds.config import Recipe, override_recipe
from bmtpt_ds.config.methods import SOURCE_KIND
from bmtpt_ds.data.tokens import load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.export.adapter import Adapter, read_adapter
from bmtpt_ds.export.record import FOREIGN, RECORD, Record, read_record
from bmtpt_ds.files import write_atomically
from bmtpt_ds.folders import check_out, draft_of
from bmtpt_ds.hub import find_model
from bmtpt_ds.model.identity import weights_digest
from bmtpt_ds.model_folder import read_architecture
from bmtpt_ds.prompt_files import check_identity
from bmtpt_ds.quiet import is_first_rank, say, say_if_longer
from bmtpt_ds.run_directory import config_text
from bmtpt_ds.run_files import CONFIG, PARTICLES, PROMPT, RESULTS
from bmtpt_ds.session import versions
from bmtpt_ds.tasks import get_task

_FILES = {CONFIG, PARTICLES, PROMPT, RESULTS}


def run_import(
    folders: Sequence[Path], out: Path, names: Sequence[str], overrides: list[str], *, overwrite: bool
) -> None:
    """Writes `out`, a run's folder: `adapt --particles` takes every prompt of the adapters as a particle.

    Where the tasks are known, because `bmtpt export` made the adapter or `names` says them, it is a run of `adapt` as
    well, which `evaluate` and `predict` take: a MULTITASK_PROMPT_TUNING adapter's W, a and b as they are, a single
    prompt as W with a and b at one. Without tasks, and of several adapters, it is a run of `source`. An adapter that
    `bmtpt export` made of a whole run becomes that run again, bit for bit.

    Args:
        names: tasks, by their number; of one adapter only.
        overrides: `key=value` texts above the recipe that `out` gets; model.name_or_path is by default what the
            adapters name.

    Raises:
        UserError: adapters that cannot be taken, or not together, or belong to another model; nothing is written.
    """
    if not is_first_rank():
        return
    check_out(
        out, "import", "an import", mark=lambda folder: (folder / CONFIG).is_file(), own=_is_own, overwrite=overwrite
    )
    adapters = [read_adapter(folder) for folder in folders]
    records = [read_record(folder) for folder in folders]
    record = records[0] if len(folders) == 1 else None
    particles = _together(adapters)
    tasks = _tasks(adapters, record, names)
    recipe = _recipe(adapters, record, tasks, overrides, particles)
    for name in tasks:
        get_task(name, recipe.data.tasks)
    identity = _identity(recipe, particles, folders[0])
    for folder, known in zip(folders, records, strict=True):
        if known:
            check_identity(Stored(folder / RECORD, {}, known.state), identity)
    changed = record is not None and record.weights_sha256 not in (None, adapters[0].sha256)
    state = _state(adapters, record, tasks, identity, recipe, changed=changed)
    restored = record if _restores(record, names) and not changed else None
    _write(out, adapters[0], particles, tasks, recipe, state, restored)
    if changed:
        say(f"import: {folders[0]}: its weights are not those that were exported; the run's scores are left out")
    count = f"{len(particles)} prompt{'s' * (len(particles) > 1)} of {particles.shape[1]} tokens"
    say(f"import: {count} in {out}; a start for --particles {out}{_also(out, tasks)}")


def _also(out: Path, tasks: Sequence[str]) -> str:
    if tasks:
        return f", and the prompt for {', '.join(tasks)} for --prompt {out}"
    return f", and, their mean, for --prompt {out} --task T"


def _together(adapters: Sequence[Adapter]) -> torch.Tensor:
    """All prompts as particles [M, L, H]."""
    for adapter in adapters:
        theirs, first = (list(one.prompt.full.shape) for one in (adapter, adapters[0]))
        if theirs != first:
            both = f"{adapter.folder} are {theirs}, those of {adapters[0].folder} {first}"
            raise UserError(f"--peft: the prompts [tokens, hidden size] of {both}: give adapters of one shape")
    return torch.cat([adapter.prompts for adapter in adapters])


def _tasks(adapters: Sequence[Adapter], record: Record | None, names: Sequence[str]) -> list[str]:
    """By the number of the task; none where they are not known."""
    if len(adapters) > 1:
        if names:
            raise UserError(f"--task: {len(adapters)} adapters become particles, of no single task; leave it out")
        return []
    tasks = list(names) or (record.tasks if record and record.stage == "adapt" else [])
    count = len(adapters[0].prompts)
    if tasks and len(tasks) != count:
        who = "--task" if names else adapters[0].folder / RECORD
        raise UserError(f"{who}: names {len(tasks)} tasks, but {adapters[0].folder} holds {count}: name each once")
    if len(set(tasks)) < len(tasks):
        raise UserError(f"--task: names {', '.join(tasks)}: name each task once")
    return tasks


def _recipe(
    adapters: Sequence[Adapter], record: Record | None, tasks: list[str], overrides: list[str], particles: torch.Tensor
) -> Recipe:
    """What `out` gets as its recipe: the exported run's, or the defaults with what the adapters say."""
    if not any(override.startswith("model.name_or_path=") for override in overrides):
        _check_base_models(adapters)
    length = particles.shape[1]
    values: dict[str, Any] = deepcopy(record.recipe) if record else {"source": {"particles": len(particles)}}
    values.setdefault("model", {})["name_or_path"] = adapters[0].base_model
    values.setdefault("prompt", {})["length"] = length
    target = values.setdefault("target", {})
    if tasks and target.get("tasks") != tasks:
        target |= {"tasks": tasks, "multi": len(tasks) > 1}
    recipe = override_recipe(values, overrides, str(adapters[0].folder / RECORD) if record else "--set")
    if recipe.prompt.length != length:
        raise UserError(f"--set prompt.length={recipe.prompt.length}: the prompts have {length} tokens; leave it out")
    return recipe


def _check_base_models(adapters: Sequence[Adapter]) -> None:
    mend = "say which T5 they belong to with --set model.name_or_path=..."
    for adapter in adapters:
        if not adapter.base_model:
            raise UserError(f"--peft {adapter.folder}: names no base model; {mend}")
        if adapter.base_model != adapters[0].base_model:
            both = " and ".join(f"{one.folder} names {one.base_model}" for one in (adapters[0], adapter))
            raise UserError(f"--peft: {both} as its base model; {mend}")


def _identity(recipe: Recipe, particles: torch.Tensor, adapter: Path) -> dict[str, Any]:
    """What the prompts belong to, as `Session.identity` has it of a loaded model."""
    name = recipe.model.name_or_path
    folder = find_model(name)
    hidden, length = read_architecture(folder).hidden_size, particles.shape[1]
    if hidden != particles.shape[2]:
        theirs = f"its prompts have hidden size {particles.shape[2]}, {name} has {hidden}"
        raise UserError(f"--peft {adapter}: {theirs}; set model.name_or_path to the model that it was trained with")
    with say_if_longer(f"reading the weights of {name}"):
        weights = weights_digest(folder)
    tokenizer = tokenizer_digest(load_tokenizer(folder))
    return {"model": name, "weights": weights, "tokenizer": tokenizer, "length": length, "hidden_size": hidden}


def _state(
    adapters: Sequence[Adapter],
    record: Record | None,
    tasks: list[str],
    identity: dict[str, Any],
    recipe: Recipe,
    *,
    changed: bool,
) -> dict[str, Any]:
    """Of the files: what is known of the prompts; of what is not, the state says so itself.

    Args:
        changed: whether others have trained on with what `record` tells of, so that the prompts are theirs.
    """
    came = [
        {
            "folder": str(adapter.folder),
            "peft_type": adapter.kind,
            "peft_version": adapter.peft_version,
            "sha256": adapter.sha256,
        }
        for adapter in adapters
    ]
    if record and not changed:
        return record.state | identity | {"tasks": tasks or record.tasks, "imported": came}
    return identity | {
        "method": FOREIGN,
        "seed": None,
        "ranks": None,
        "versions": versions(),
        "recipe": recipe.model_dump(mode="json"),
        "tasks": tasks,
        "rows_processed": {"source": 0, "target": 0},
        "imported": came,
        "unknown": ["seed", "ranks", "rows_processed"],  # an adapter does not say; 0 rows are those known of
    }


def _restores(record: Record | None, names: Sequence[str]) -> bool:
    return record is not None and record.whole and (not names or list(names) == record.tasks)


def _write(
    out: Path,
    adapter: Adapter,
    particles: torch.Tensor,
    tasks: list[str],
    recipe: Recipe,
    state: dict[str, Any],
    restored: Record | None,
) -> None:
    """`restored`: the run that `out` is to be again."""
    processed = state["rows_processed"]
    before = {"source": sum(processed.values()), "target": 0}  # of a stage that starts here
    with draft_of(out) as draft:
        about = state | {"rows_processed": before}
        if SOURCE_KIND.get(state.get("method", "bmtpt")) != "particles":
            about["method"] = FOREIGN  # whatever trained them, as particles they are nothing of its own
        write_tensors(draft / PARTICLES, {"particles": particles}, about)
        if tasks:
            about = restored.state if restored else state
            write_tensors(draft / PROMPT, adapter.prompt.named(tasks), about)
        write_atomically(draft / CONFIG, config_text({"stage": "adapt" if tasks else "source"}, recipe).encode())
        if restored and restored.results:
            write_atomically(draft / RESULTS, (json.dumps(restored.results, indent=2) + "\n").encode())


def _is_own(name: Path, path: Path) -> bool:
    return len(name.parts) == 1 and path.is_file() and name.name in _FILES
