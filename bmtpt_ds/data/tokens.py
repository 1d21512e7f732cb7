"""Rows as token ids, and batches of them as padded tensors."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bmtpt_ds.config import DataConfig, ModelConfig
from bmtpt_ds.data.prepared import PreparedRow
from bmtpt_ds.errors import UserError
from bmtpt_ds.model_folder import read_architecture, tokenizer_files
from bmtpt_ds.tasks import Example, LabelStyle, Task

IGNORE = -100  # label of a padded target position
FREE_TEXT = 32  # tokens of a target whose texts have no end, end-of-sequence included


@dataclass(frozen=True)
class TokenRow:
    """One row of a task: token ids of its text and of its target, end-of-sequence included."""

    source: list[int]
    target: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest."""

    source_ids: torch.Tensor  # [N, S]
    source_mask: torch.Tensor | None  # [N, S], 1 at tokens; None: there is no padding
    labels: torch.Tensor | None  # [N, T], IGNORE at padding; None: not known


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        UserError: none there, a damaged one, one of more tokens than the model has.
    """
    tokenizer_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds: no file, not JSON, a key that is not there, a package that is missing
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        mend = "install it" if isinstance(error, ImportError) else "copy the model folder again"
        raise UserError(f"{folder}: its tokenizer cannot be read ({reason}); {mend}") from None
    known = read_architecture(folder).vocab_size
    if len(tokenizer) > known:  # else the embedding fails in the midst of the run
        have = f"the tokenizer has {len(tokenizer)} tokens, the model {known}"
        raise UserError(f"{folder}: {have}; copy the model's own tokenizer there")
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a vocabulary: its pieces and their ids, whatever files they came from."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(pieces).encode()).hexdigest()


class RowEncoder:
    """Turns a task's rows into token ids, when they are needed: a step of the source stage reads only a few rows.

    Two threads may use it at once. So texts are cut here: to let the tokenizer do it changes the tokenizer meanwhile.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, data: DataConfig):
        self.tokenizer = tokenizer
        self._model, self._data = model, data
        self._longest: dict[str, int] = {}  # by task
        self._read: Counter[Task] = Counter()  # rows
        self._shortened: Counter[Task] = Counter()  # of these, those that were too long
        self._counting = Lock()

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
        return self.encode_all(task, [row])[0]

    def encode_all(self, task: Task, rows: Sequence[dict]) -> list[TokenRow]:
        """Many rows at once: the same ids, several times faster. Prepared rows bring theirs."""
        if rows and all(isinstance(row, PreparedRow) for row in rows):
            return [TokenRow(row.source_ids.tolist(), row.target_ids.tolist()) for row in rows]
        texts = [self.text(task, row) for row in rows]
        sources = self._encode_fields(task, rows, [text.source for text in texts])
        targets = {text.target: self.encode_target(task, text.target) for text in texts}
        return [TokenRow(ids, targets[text.target]) for ids, text in zip(sources, texts, strict=True)]

    def encode_text(self, task: Task, text: str) -> list[int]:
        """Token ids of a text for a task, its end cut off where it is too long, end-of-sequence included."""
        return _cut(self._tokenised([text])[0], self.max_source_length(task))

    def encode_source(self, task: Task, row: dict) -> list[int]:
        """Token ids of a row's source text; its answer need not be known."""
        return self._encode_fields(task, [row], [task.source_text(row, self._data.prefix)])[0]

    def _encode_fields(self, task: Task, rows: Sequence[dict], texts: Sequence[str]) -> list[list[int]]:
        """As encode_text; of a text that is too long the long field is cut, so that a question survives its passage.

        All fields are cut to the same number of characters, the greatest with which the text fits: the short ones are
        shorter anyway.
        """
        whole, most = self._tokenised(texts), self.max_source_length(task)
        long = [i for i, ids in enumerate(whole) if len(ids) > most]
        for i in long:
            whole[i] = self._shorten(task, rows[i])
        with self._counting:
            self._read[task] += len(rows)
            if long:
                self._shortened[task] += len(long)
        return whole

    def _shorten(self, task: Task, row: dict) -> list[int]:
        def text(most: int | None) -> str:
            return task.source_text(row, self._data.prefix, most)

        fields = task.field_texts(row)
        if len(fields) == 1:
            return self.encode_text(task, text(None))
        fits, over = 0, max(len(value) for _, value in fields)  # characters; at `over` it does not fit
        while over - fits > 1:
            middle = (fits + over) // 2
            if len(self._tokenised([text(middle)])[0]) <= self.max_source_length(task):
                fits = middle
            else:
                over = middle
        return self.encode_text(task, text(fits))

    def _tokenised(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), verbose=False).input_ids

    def cut_rows(self) -> str:
        """Of the rows read so far those that were too long, for a person; "" where there were none."""
        shares = [f"{task.name} {self._share_cut(task)}" for task in self._shortened]
        return f"cut to model.max_source_length, of the rows read: {', '.join(shares)}" if shares else ""

    def _share_cut(self, task: Task) -> str:
        share = self._shortened[task] / self._read[task]
        return f"{100 * share:.1f}% (to {self.max_source_length(task)} tokens)"

    def encode_target(self, task: Task, text: str) -> list[int]:
        return _cut(self._tokenised([text])[0], self.max_target_length(task))

    def max_source_length(self, task: Task) -> int:
        """Tokens that a row's text may have, as the recipe says or, with `auto`, the task."""
        most = self._model.max_source_length
        return task.max_source_length if most == "auto" else most

    def max_target_length(self, task: Task) -> int:
        """Tokens of a task's longest target, end-of-sequence included: the longest label, 32 of free text and numbers.

        As the recipe says where it does.
        """
        if self._model.max_target_length != "auto":
            return self._model.max_target_length
        if task.name not in self._longest:
            texts = task.answer_texts(self._data.labels)
            lengths = [len(ids) for ids in self.tokenizer(list(texts)).input_ids] if texts else [FREE_TEXT]
            self._longest[task.name] = max(lengths)
        return self._longest[task.name]

    def check_answers(self, task: Task) -> None:
        """Refuses a task whose targets do not survive the tokenizer: no answer would ever be right.

        Raises:
            UserError: names the target and how it reads back.
        """
        for text in task.answer_texts(self._data.labels) or ():
            back = self.tokenizer.decode(self.encode_target(task, text), skip_special_tokens=True).strip()
            if back != text:
                mends = ["take another model"]
                mends += ["set model.max_target_length=auto"] if self._model.max_target_length != "auto" else []
                mends += ["set data.labels=digits"] if self._data.labels == "words" else []
                problem = f"the model's tokenizer reads the answer {text!r} back as {back!r}: it could never be right"
                raise UserError(f"task {task.name}: {problem}; {' or '.join(mends)}")


@dataclass(frozen=True)
class HostBatches:
    """Padded batches on the host, ready to go to a device in one transfer."""

    flat: torch.Tensor  # of each batch its ids, mask and labels
    shapes: Sequence[tuple[int, int]]  # of each of these
    padded: Sequence[bool]  # whether a batch's sources are of several lengths

    def on(self, device: torch.device) -> list[Batch]:
        parts = upload(self.flat, device).split([rows * width for rows, width in self.shapes])
        views = iter([part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)])
        triples = zip(self.padded, views, views, views, strict=True)
        return [Batch(source, mask if padded else None, labels) for padded, source, mask, labels in triples]


def collate(buckets: Sequence[Sequence[TokenRow]], pad_id: int) -> HostBatches:
    """Pads the rows of each bucket on the right to its longest."""
    parts: list[torch.Tensor] = []
    for rows in buckets:
        source, mask = [row.source for row in rows], [[1] * len(row.source) for row in rows]
        parts += [pad(source, pad_id), pad(mask, 0), pad([row.target for row in rows], IGNORE)]
    flat = torch.cat([part.flatten() for part in parts])
    padded = [len({len(row.source) for row in rows}) > 1 for rows in buckets]
    return HostBatches(flat, [tuple(part.shape) for part in parts], padded)


def _cut(ids: list[int], most: int) -> list[int]:
    """At most so many token ids, the last of them end-of-sequence."""
    return ids if len(ids) <= most else ids[: most - 1] + ids[-1:]


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host's on the device; the host does not wait for what a GPU still has to do before."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def pad(ids: Sequence[list[int]], value: int) -> torch.Tensor:
    """Lists of numbers as a tensor [lists, longest], `value` behind the shorter ones."""
    width = max(len(row) for row in ids)
    return torch.tensor([row + [value] * (width - len(row)) for row in ids], dtype=torch.long)
