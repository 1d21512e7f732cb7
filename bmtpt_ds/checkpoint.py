"""Run state on disk: one safetensors file a checkpoint, atomic, checksummed, nothing of ranks in it.

A file holds named tensors and, as JSON in its header, a state of plain values. It comes into being under its name only
when it is complete; a file that is damaged later is found out by its SHA-256, named, and the one before it is used.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bmtpt_ds.errors import UserError, written
from bmtpt_ds.files import write_atomically

GO_ON = "then go on with --resume"  # what a run may do where it could not write
_PREFIX, _SUFFIX = "step-", ".safetensors"


@dataclass(frozen=True)
class Stored:
    """What one file holds."""

    path: Path
    tensors: dict[str, torch.Tensor]  # on the CPU
    state: dict[str, Any]  # plain JSON values


class Damaged(UserError):
    """A file whose content is not what was written."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Writes a file of a run atomically: under another name, flushed to the disk, then renamed.

    Args:
        tensors: on any device.
        state: plain values that JSON knows.

    Raises:
        UserError: the folder cannot be written (permission, disk full); what was at `path` before is untouched.
    """
    cpu = {name: t.detach().to("cpu", copy=False).contiguous() for name, t in tensors.items()}
    text = json.dumps(state, sort_keys=True)
    data = save(cpu, metadata={"state": text, "sha256": _digest(cpu, text)})
    write_atomically(path, data, GO_ON)


def read_tensors(path: Path) -> Stored:
    """Reads a file that `write_tensors` wrote.

    Raises:
        Damaged: truncated, altered, or not such a file at all.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise Damaged(f"{path}: damaged ({str(error).splitlines()[0]})") from None
    if "state" not in metadata or "sha256" not in metadata:
        raise Damaged(f"{path}: not a file of bmtpt_ds (its header has no state)")
    if _digest(tensors, metadata["state"]) != metadata["sha256"]:
        raise Damaged(f"{path}: damaged (its content does not match its SHA-256)")
    return Stored(path, tensors, json.loads(metadata["state"]))


def _digest(tensors: Mapping[str, torch.Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of a run: the last `keep` of them."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self._keep = folder, keep

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step`, then drops those that are over, and those of later steps: a run that has
        come to `step` without them has found them damaged."""
        with written(self.folder, GO_ON):
            self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"{_PREFIX}{step:08d}{_SUFFIX}"
        write_tensors(own, tensors, {**state, "step": step})
        paths = self._paths()
        until = paths.index(own) + 1
        for path in [*paths[: max(0, until - self._keep)], *paths[until:]]:
            path.unlink(missing_ok=True)

    def load_latest(self) -> tuple[Stored | None, list[str]]:
        """The newest checkpoint that is sound, and a line for each newer one that is not.

        Raises:
            UserError: there are checkpoints, and none is sound.
        """
        refused: list[str] = []
        for path in reversed(self._paths()):
            try:
                return read_tensors(path), refused
            except Damaged as damage:
                refused.append(str(damage))
        if refused:
            raise UserError(f"{refused[0]}; no sound checkpoint is left: start again with --overwrite")
        return None, refused

    def _paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*{_SUFFIX}"))
