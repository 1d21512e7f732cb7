"""particles.safetensors and prompt.safetensors: what a run leaves for others, and which backbone it belongs to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bmtpt_ds.checkpoint import Damaged, Stored, read_tensors, write_tensors
from bmtpt_ds.config.methods import SOURCE_KIND
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.run_files import PARTICLES, PROMPT, RUNS
from bmtpt_ds.session import Session

# what of a file's state tells its backbone, and in words
_OF_A_MODEL = (("hidden_size", "hidden size"), ("weights", "weights"), ("tokenizer", "tokenizer"))


def write_particles(
    folder: Path, session: Session, tensors: Mapping[str, torch.Tensor], tasks: list[str], processed: dict
) -> None:
    """Writes what a source run has learned; `processed` counts the rows of both stages."""
    about = session.identity() | {"tasks": tasks, "rows_processed": processed}
    write_tensors(folder / PARTICLES, tensors, about)


def write_prompt(
    folder: Path,
    session: Session,
    tensors: Mapping[str, torch.Tensor],
    tasks: list[str],
    processed: dict,
    parameters: int,
) -> None:
    """Writes what a run of `adapt` has trained: `parameters` numbers; `tasks` in the order of its prompts."""
    about = session.identity() | {"tasks": tasks, "rows_processed": processed, "trainable_parameters": parameters}
    write_tensors(folder / PROMPT, tensors, about)


def read_particles(name: str, method: str) -> Stored:
    """What a method begins at, as `--particles` names it: a run's folder or the file itself.

    Raises:
        UserError: no such file, a damaged one, or one of a method whose source stage leaves something else.
    """
    path = Path(name)
    if not path.exists():
        raise UserError(f"--particles {name}: no such file or folder; give a run of `bmtpt source`, or none")
    file = path / PARTICLES if path.is_dir() else path
    if not file.is_file():
        mend = "give a run of `bmtpt source`, and finish it first (--resume) if it was broken off"
        raise UserError(f"--particles {name}: no {PARTICLES} there; {mend}")
    stored = _read(file, "source")
    theirs = stored.state.get("method", "bmtpt")
    if SOURCE_KIND.get(theirs) != SOURCE_KIND[method]:
        able = "bmtpt" if SOURCE_KIND.get(theirs) == "particles" else theirs
        raise UserError(
            f"--particles {name}: of method {theirs}, but method {method} begins at {SOURCE_KIND[method]}: "
            f"give a source run of method {method}, or --set method={able}"
        )
    return stored


def read_run(folder: Path, stage: str) -> Stored:
    """The outcome of a finished run of `source` or `adapt`."""
    file = folder / (PARTICLES if stage == "source" else PROMPT)
    if not file.is_file():
        if runs := sorted(entry for entry in (folder / RUNS).glob("*") if entry.is_dir()):
            raise UserError(f"{folder}: holds {len(runs)} runs side by side; give one of them, such as {runs[0]}")
        raise UserError(f"{folder}: no {file.name} there; finish that run first (--resume)")
    return _read(file, stage)


def _read(path: Path, command: str) -> Stored:
    try:
        stored = read_tensors(path)
    except Damaged as damage:
        raise UserError(f"{damage}; copy it again, or give another run of `bmtpt {command}`") from None
    if _of_source(stored) != (command == "source"):
        what = "what a source stage learned" if command == "source" else "an adapted prompt"
        raise UserError(f"{path}: does not hold {what}; give a run of `bmtpt {command}`")
    if "rows_processed" not in stored.state:
        raise UserError(f"{path}: a checkpoint; finish its run (--resume) and give its folder")
    return stored


def check_answers(stored: Stored, task: str) -> None:
    """Refuses a task that a finished run has no prompt for.

    Raises:
        UserError: a run of `adapt`, or a source run with a prompt a task, for other tasks.
    """
    own = stored.state.get("tasks", [])
    if task in own or (_of_source(stored) and not _has_a_prompt_a_task(stored)):
        return
    theirs = ", ".join(own)
    if _of_source(stored):
        whose = f"none for {task}" if task else "no one prompt for all"
        raise UserError(f"{stored.path}: holds a prompt for each of {theirs}, {whose}; adapt it first (bmtpt adapt)")
    raise UserError(f"{stored.path}: its prompt is for {theirs} and not for {task}; leave out --set target.tasks")


def prompt_for(stored: Stored, task: str) -> torch.Tensor:
    """The prompt [L, H] for a task: of a run of `adapt` the task's own; of a run of `source` the particles' mean, or
    the source task's own where there is a prompt a task.

    Raises:
        UserError: as `check_answers`.
    """
    check_answers(stored, task)
    tensors, own = stored.tensors, stored.state.get("tasks", [])
    if "particles" in tensors:
        particles = tensors["particles"]
        return particles[own.index(task)] if _has_a_prompt_a_task(stored) else particles.mean(dim=0)
    if task in own:
        a, b = tensors[f"{task}.a"], tensors[f"{task}.b"]
    else:  # of MPT's source stage: where its target prompts begin
        a, b = (torch.stack([tensors[f"{name}.{part}"] for name in own]).mean(dim=0) for part in ("a", "b"))
    full = tensors["shared" if "shared" in tensors else "full"]
    return ComposedPrompt(full, a[None], b[None]).compose()[0]


def _has_a_prompt_a_task(stored: Stored) -> bool:
    return SOURCE_KIND.get(stored.state.get("method")) == "a prompt a task"


def _of_source(stored: Stored) -> bool:
    return not {"particles", "shared"}.isdisjoint(stored.tensors)


def check_one_model(stored: Sequence[Stored]) -> None:
    """Refuses prompts of different backbones, which no one backbone can read.

    Raises:
        UserError: other weights, another tokenizer, other shapes than the first one's.
    """
    first = stored[0]
    for other in stored[1:]:
        for key, name in _OF_A_MODEL:
            if other.state.get(key) != first.state.get(key):
                raise UserError(
                    f"{first.path} belongs to {first.state.get('model')} and {other.path} to "
                    f"{other.state.get('model')}, whose {name} differs: give prompts of one model"
                )


def check_belongs(stored: Stored, session: Session) -> None:
    """Refuses prompts of another backbone: a prompt means nothing to any model but its own.

    Raises:
        UserError: other weights, another tokenizer, other shapes.
    """
    check_identity(stored, session.identity())


def check_identity(stored: Stored, ours: Mapping[str, Any]) -> None:
    """As `check_belongs`, of a backbone of which no more is known than `Session.identity` tells."""
    theirs = stored.state
    for key, name in _OF_A_MODEL:
        if theirs.get(key) != ours[key]:
            raise UserError(
                f"{stored.path}: belongs to {theirs.get('model')}, whose {name} ({str(theirs.get(key))[:12]}) "
                f"differs from that of {ours['model']} ({str(ours[key])[:12]}): "
                "set model.name_or_path to the model that it was trained with"
            )
    length = theirs.get("length")
    if length != ours["length"]:
        raise UserError(
            f"{stored.path}: its prompts have {length} tokens, but prompt.length is {ours['length']}: "
            f"add --set prompt.length={length}"
        )
