"""A T5 checkpoint on disk, read one tensor at a time, and fingerprints that hold for a sharded tensor too."""

import hashlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bmtpt_ds.errors import UserError

SHARED = "shared.weight"
HEAD = "lm_head.weight"
# names under which checkpoints store the input embedding besides, or in place of, `shared.weight`
SHARED_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# what is needed of a hub repository: nothing of other frameworks
HUB_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "spiece.model", "tokenizer*")

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements; bounds the temporaries of a fingerprint


def find_model(name_or_path: str) -> Path:
    """The local folder of a model: itself, or the hub's snapshot of that name (downloaded where it is not cached)."""
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name_or_path {folder}: no config.json in that folder; it should be a T5 checkpoint")
        return folder
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise UserError(f"model.name_or_path {name_or_path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        # a repository that has both formats would bring its weights twice
        files = [f for f in HUB_FILES if not f.endswith(".bin")]
        found = Path(snapshot_download(name_or_path, allow_patterns=files))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name_or_path, allow_patterns=list(HUB_FILES)))
        return found
    except Exception as error:  # the hub client raises many kinds: not found, no network, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.name_or_path {name_or_path}: no such folder, and the hub gave none ({reason}); "
            "without network give the folder of a downloaded checkpoint"
        ) from None


class CheckpointReader:
    """The tensors of a checkpoint folder by name, each read from its file when it is asked for.

    Knows `model.safetensors` and `pytorch_model.bin`, whole or in shards with an index file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._bin: tuple[Path, dict] | None = None  # the .bin shard that was mapped last
        self._files = self._index()

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file."""
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index, single = self.folder / f"{stem}.index.json", self.folder / stem
            if index.is_file():
                try:
                    names = json.loads(index.read_text())["weight_map"]
                    return {name: self.folder / file for name, file in names.items()}
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise UserError(f"{index}: not a checkpoint index; copy the model folder again") from None
            if single.is_file():
                return dict.fromkeys(self._names_of(single), single)
        raise UserError(f"{self.folder}: no model.safetensors and no pytorch_model.bin in that folder")

    def _names_of(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            return list(self._map_bin(file))
        with self._open(file) as tensors:
            return list(tensors.keys())

    def _open(self, file: Path):
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error}); copy the model folder again") from None

    def _map_bin(self, file: Path) -> dict:
        if self._bin is None or self._bin[0] != file:
            try:
                self._bin = file, torch.load(file, mmap=True, weights_only=True, map_location="cpu")
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{file}: cannot be read ({reason}); copy the model folder again") from None
        return self._bin[1]

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def _stored_name(self, name: str) -> str | None:
        candidates = (name, *SHARED_ALIASES) if name == SHARED else (name,)
        return next((n for n in candidates if n in self._files), None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's own dtype, on the CPU."""
        stored = self._stored_name(name)
        if stored is None:
            raise UserError(f"{self.folder}: the checkpoint lacks {name}; it is not the T5 that its config.json says")
        file = self._files[stored]
        if file.suffix == ".bin":
            return self._map_bin(file)[stored]
        with self._open(file) as tensors:
            try:
                return tensors.get_tensor(stored)
            except SafetensorError as error:
                raise UserError(f"{file}: {stored} cannot be read ({error}); copy the model folder again") from None

    def has_own_head(self) -> bool:
        """Whether the output head differs from the input embedding (flan-t5, t5-v1.1), not whether a flag says so."""
        return HEAD in self and not torch.equal(self.read(HEAD), self.read(SHARED))


def fingerprint(values: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Checksum of a flat tensor that begins at element `offset` of a larger one.

    The sum over elements of (their bits as an integer) x (2 position + 1), modulo 2^64: exact, so that the sum over a
    tensor's shards is the tensor's own, and sensitive to order.

    Returns:
        int64 scalar on the tensor's device.
    """
    bits = values.detach().reshape(-1).view(_BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(offset + start, offset + start + part.numel(), device=part.device)
        total += (part * (2 * position + 1)).sum()
    return total


class WeightsIdentity:
    """Digest of a checkpoint as stored: the same whatever dtype or sharding it is loaded in."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, stored: torch.Tensor) -> None:
        print_ = fingerprint(stored.contiguous()).item()
        self._lines.append(f"{name} {tuple(stored.shape)} {stored.dtype} {print_}")

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()
