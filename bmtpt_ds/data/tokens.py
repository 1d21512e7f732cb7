"""Rows as token ids, and batches of them as padded tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bmtpt_ds.config import DataConfig, ModelConfig
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import Example, Task
from bmtpt_ds.tasks.task import LabelStyle

IGNORE = -100  # label of a padded target position
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True)
class TokenRow:
    """One row of a task: token ids of its text and of its target, end-of-sequence included."""

    source: list[int]
    target: list[int]


@dataclass(frozen=True)
class Batch:
    source_ids: torch.Tensor  # [N, S]
    source_mask: torch.Tensor  # [N, S], 1 at tokens
    labels: torch.Tensor  # [N, T], IGNORE at padding


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    # transformers makes up an empty vocabulary where it finds none of these
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer there; add its {' or '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds: no file, not JSON, a key that is not there, a package that is missing
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        mend = "install it" if isinstance(error, ImportError) else "copy the model folder again"
        raise UserError(f"{folder}: its tokenizer cannot be read ({reason}); {mend}") from None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a vocabulary: its pieces and their ids, whatever files they came from."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(pieces).encode()).hexdigest()


class RowEncoder:
    """Turns a task's rows into token ids, when they are needed: a step of the source stage reads only a few rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, data: DataConfig):
        self.tokenizer = tokenizer
        self._model, self._data = model, data
        self._longest: dict[str, int] = {}  # by task

    @property
    def labels(self) -> LabelStyle:
        return self._data.labels

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def text(self, task: Task, row: dict) -> Example:
        """The row as text, before any truncation."""
        return task.example(row, labels=self._data.labels, prefix=self._data.prefix)

    def encode(self, task: Task, row: dict) -> TokenRow:
        text = self.text(task, row)
        source = self.tokenizer(text.source, truncation=True, max_length=self._model.max_source_length)
        return TokenRow(source.input_ids, self.encode_target(task, text.target))

    def encode_target(self, task: Task, text: str) -> list[int]:
        return self.tokenizer(text, truncation=True, max_length=self.max_target_length(task)).input_ids

    def max_target_length(self, task: Task) -> int:
        """Tokens of the longest label of a task, end-of-sequence included; as the recipe says where it does."""
        if self._model.max_target_length != "auto":
            return self._model.max_target_length
        if task.name not in self._longest:
            labels = task.label_texts(self._data.labels)
            self._longest[task.name] = max(len(self.tokenizer(label).input_ids) for label in labels)
        return self._longest[task.name]


def collate(rows: Sequence[TokenRow], pad_id: int, device: torch.device) -> Batch:
    """Pads rows on the right to the longest."""
    source = _pad([row.source for row in rows], pad_id)
    mask = _pad([[1] * len(row.source) for row in rows], 0)
    labels = _pad([row.target for row in rows], IGNORE)
    return Batch(source.to(device), mask.to(device), labels.to(device))


def _pad(ids: list[list[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in ids)
    return torch.tensor([row + [value] * (width - len(row)) for row in ids])
