"""particles.safetensors and prompt.safetensors: what a run leaves for others, and which backbone it belongs to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bmtpt_ds.checkpoint import Damaged, Stored, read_tensors, write_tensors
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.run_files import PARTICLES, PROMPT, RUNS
from bmtpt_ds.session import Session

# what of a file's state tells its backbone, and in words
_OF_A_MODEL = (("hidden_size", "hidden size"), ("weights", "weights"), ("tokenizer", "tokenizer"))


def write_particles(folder: Path, session: Session, particles: torch.Tensor, tasks: list[str], processed: dict) -> None:
    """Writes the particles [M, L, H] of a source run; `processed` counts the rows of both stages."""
    about = session.identity() | {"tasks": tasks, "rows_processed": processed}
    write_tensors(folder / PARTICLES, {"particles": particles}, about)


def write_prompt(folder: Path, session: Session, prompt: ComposedPrompt, tasks: list[str], processed: dict) -> None:
    """Writes the target prompts of a run of `adapt`; `tasks` in the order of the prompts."""
    about = session.identity() | {"tasks": tasks, "rows_processed": processed}
    write_tensors(folder / PROMPT, prompt_tensors(prompt, tasks), about)


def prompt_tensors(prompt: ComposedPrompt, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a prompt.safetensors holds; `tasks` in the order of the prompts."""
    own = {f"{task}.{name}": getattr(prompt, name)[k] for k, task in enumerate(tasks) for name in ("a", "b")}
    return {"full": prompt.full} | own


def read_particles(name: str) -> Stored:
    """The particles that `--particles` names: a run's folder or the file itself."""
    path = Path(name)
    if not path.exists():
        raise UserError(f"--particles {name}: no such file or folder; give a run of `bmtpt source`, or none")
    file = path / PARTICLES if path.is_dir() else path
    if not file.is_file():
        mend = "give a run of `bmtpt source`, and finish it first (--resume) if it was broken off"
        raise UserError(f"--particles {name}: no {PARTICLES} there; {mend}")
    return _read(file, "particles", "source")


def read_run(folder: Path, stage: str) -> Stored:
    """The outcome of a finished run of `source` or `adapt`."""
    file, tensor = (folder / PARTICLES, "particles") if stage == "source" else (folder / PROMPT, "full")
    if not file.is_file():
        if runs := sorted(entry for entry in (folder / RUNS).glob("*") if entry.is_dir()):
            raise UserError(f"{folder}: holds {len(runs)} runs side by side; give one of them, such as {runs[0]}")
        raise UserError(f"{folder}: no {file.name} there; finish that run first (--resume)")
    return _read(file, tensor, stage)


def _read(path: Path, tensor: str, command: str) -> Stored:
    try:
        stored = read_tensors(path)
    except Damaged as damage:
        raise UserError(f"{damage}; copy it again, or give another run of `bmtpt {command}`") from None
    if tensor not in stored.tensors:
        raise UserError(f"{path}: holds no tensor {tensor!r}; give a run of `bmtpt {command}`")
    if "rows_processed" not in stored.state:
        raise UserError(f"{path}: a checkpoint; finish its run (--resume) and give its folder")
    return stored


def prompt_for(stored: Stored, task: str) -> torch.Tensor:
    """The prompt [L, H] for a task: of a run of `adapt` the task's own, of a run of `source` the particles' mean.

    Raises:
        UserError: a run of `adapt` for another task.
    """
    if "particles" in stored.tensors:
        return stored.tensors["particles"].mean(dim=0)
    if f"{task}.a" not in stored.tensors:
        theirs = ", ".join(stored.state["tasks"])
        raise UserError(f"{stored.path}: its prompt is for {theirs} and not for {task}; leave out --set target.tasks")
    a, b = stored.tensors[f"{task}.a"], stored.tensors[f"{task}.b"]
    return ComposedPrompt(stored.tensors["full"], a[None], b[None]).compose()[0]


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
