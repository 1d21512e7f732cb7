"""A T5 checkpoint on disk, read one tensor at a time, and fingerprints that hold for a sharded tensor too."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bmtpt_ds.errors import UserError
from bmtpt_ds.model_folder import INDEX, checkpoint_file, shards

SHARED = "shared.weight"
HEAD = "lm_head.weight"
# names under which checkpoints store the input embedding besides, or in place of, `shared.weight`
SHARED_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements; bounds the temporaries of a fingerprint


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
        file = checkpoint_file(self.folder)
        return shards(file) if file.name.endswith(INDEX) else dict.fromkeys(self._names_of(file), file)

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

    def read_shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As `read`, of a tensor that config.json wants in that shape."""
        stored = self.read(name)
        if tuple(stored.shape) != shape:
            raise UserError(f"{self.folder}: {name} is {tuple(stored.shape)} but config.json says {shape}")
        return stored

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
