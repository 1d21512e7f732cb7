"""What a task is: from a raw row with the hub's columns to the text that a text-to-text model reads and writes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks.cells import json_kind
from bmtpt_ds.tasks.fields import Field
from bmtpt_ds.tasks.targets import LabelStyle, LabelTarget, Target

_LONGEST_WORD = 40  # characters; more without a space is no word, and may be cut anywhere
SplitRule = Literal["small", "large", "matched", "own"]

# The original splits that each rule of data/splits.py reads from the hub, and what the hub calls them. The hub's own
# test sets are left out where they have no labels (-1), as those of GLUE.
HUB_SPLITS: dict[SplitRule, tuple[str, ...]] = {
    "small": ("train", "validation"),
    "large": ("train", "validation"),
    "matched": ("train", "validation_matched", "validation_mismatched"),
    "own": ("train", "validation", "test"),
}


class Example(NamedTuple):
    """One row as text: what the encoder reads and what the decoder should write."""

    source: str
    target: str


@dataclass(frozen=True)
class Task:
    """Text fields, a target and metrics: one task on a hub dataset or on local files.

    Attributes:
        name: the name in recipes, results, prefixes and local folders.
        hub_repository: the dataset's repository on the Hugging Face hub; None for a task of the recipe's own.
        hub_configs: the configurations of that repository whose rows are the task's, None for the only one.
        fields: of the source text, in their order.
        target: the columns with the answer, and how it reads.
        metrics: names in `bmtpt_ds.tasks.metrics.METRICS[target.kind]`, the headline metric first.
        split_rule: how train, validation and test are cut from the original splits (`bmtpt_ds.data.splits`).
        sample: a short made-up row.
        folder: the local folder with its files; None: the hub, or the task's folders below `data.root`.
        folders: their names, where they are not the task's.
        hub_names: {original split: what the hub calls it}, where it has another name, or several ("dev_r1 dev_r2").
        group: a key path; rows that agree in it are not torn apart by a split (MultiRC's paragraphs).
        most_train: a longer training set is cut to as many rows.
        max_source_length: tokens of a row's text with the recipe's `model.max_source_length: auto`, as the line
            Compacter, ATTEMPT, MPT has it.
    """

    name: str
    hub_repository: str | None
    hub_configs: tuple[str | None, ...]
    fields: tuple[Field, ...]
    target: Target
    metrics: tuple[str, ...]
    split_rule: SplitRule
    sample: Mapping[str, Any] = field(compare=False)
    folder: str | None = None
    folders: tuple[str, ...] = ()
    hub_names: Mapping[str, str] = field(default_factory=dict, compare=False)
    group: tuple[str, ...] = ()
    most_train: int | None = None
    max_source_length: int = 256

    @property
    def source_columns(self) -> tuple[str, ...]:
        """The columns that the source text needs, each once."""
        return tuple(dict.fromkeys(column for part in self.fields for column in part.columns))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(dict.fromkeys((*self.source_columns, *self.target.columns)))

    def is_local(self, root: str | None) -> bool:
        """Whether the rows come from files and not from the hub, with the recipe's `data.root`."""
        return self.folder is not None or root is not None or self.hub_repository is None

    @property
    def hub_splits(self) -> dict[str, tuple[str, ...]]:
        """The original splits that are read from the hub, and the hub's names of their parts."""
        return {name: tuple(self.hub_names.get(name, name).split()) for name in HUB_SPLITS[self.split_rule]}

    def answer_texts(self, labels: LabelStyle) -> tuple[str, ...] | None:
        """Every text that the target can be, labels in the order of their numbers; None for free text and numbers."""
        return self.target.answers(labels)

    def label_texts(self, labels: LabelStyle) -> tuple[str, ...]:
        """All target texts in the order of the label numbers: ("0", "1", ...) or the label words.

        Raises:
            UserError: a task without labels.
        """
        self.check_scoring("labels")
        return self.target.answers(labels)

    def check_scoring(self, scoring: Literal["generate", "labels"]) -> None:
        """Refuses what the recipe's `evaluate.scoring` asks for where this task cannot be scored so.

        Raises:
            UserError: the likeliest label of a task without labels.
        """
        if scoring == "labels" and not isinstance(self.target, LabelTarget):
            what = {"number": "numbers", "text": "free text"}[self.target.kind]
            raise UserError(f"task {self.name} has no labels but {what}: set evaluate.scoring=generate")

    def class_of(self, row: Mapping[str, Any]) -> int:
        """The class by which few shots are balanced: the label's number; of numbers and text see their targets."""
        return self.target.class_of(row)

    def reference(self, row: Mapping[str, Any]) -> Any:
        """What `bmtpt_ds.tasks.metrics.score` compares a prediction for this row with."""
        return self.target.reference(row)

    def example(self, row: Mapping[str, Any], labels: LabelStyle = "digits", prefix: bool = False) -> Example:
        """Write a row as text.

        The source is `name: value` for every field, joined by one space, values untouched; with `prefix` the task's
        name goes in front ("rte sentence1: ... sentence2: ..."), as ATTEMPT (Asai et al., 2022) has it.
        """
        return Example(self.source_text(row, prefix), self.target.text(row, labels))

    def source_text(self, row: Mapping[str, Any], prefix: bool = False, most: int | None = None) -> str:
        """The text of `example` that the encoder reads, of a row whose answer need not be known.

        Args:
            most: characters that a field may have; a longer one is cut, between two words if there are two.
        """
        shown = [f"{name}: {_cut(text, most)}" for name, text in self.field_texts(row)]
        return " ".join([self.name, *shown] if prefix else shown)

    def field_texts(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(shown name, text) of the fields that the row has."""
        return [(part.shown, text) for part in self.fields if (text := part.text(row)) is not None]

    def row_problem(self, row: Any) -> str | None:
        """What keeps `row` from being a row of this task, with the mend, in one line; None for a good row."""
        if not isinstance(row, dict):
            return f"not an object with named columns but {json_kind(row)}; write {{{', '.join(self.columns)}}}"
        return _missing(self, row, self.columns) or self.source_problem(row) or self.target.problem(row)

    def source_problem(self, row: Mapping[str, Any]) -> str | None:
        """As `row_problem`, of a row whose answer need not be known."""
        if missing := _missing(self, row, self.source_columns):
            return missing
        if problem := next(filter(None, (part.problem(row) for part in self.fields)), None):
            return problem
        # the hub has rows with one field empty (a question of qqp); with nothing to read there is nothing to learn
        if self.refusal(row) is None and not any((part.text(row) or "").strip() for part in self.fields):
            return f"no text in {', '.join(map(repr, self.source_columns))}; leave the row out"
        return None

    def refusal(self, row: Mapping[str, Any]) -> str | None:
        """Why a row without a problem cannot be used; the same few words for all such rows. None for a good one."""
        return next(filter(None, (part.refusal(row) for part in self.fields)), None)


def _cut(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    head, within = text[:most], not text[most].isspace()
    word = re.split(r"\s", head)[-1]
    if within and len(word) <= _LONGEST_WORD:
        return head[: len(head) - len(word)].rstrip() or head
    return head.rstrip()


def _missing(task: Task, row: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    for column in columns:
        if column not in row:
            there = ", ".join(map(repr, list(row)[:10])) or "none"  # repr: a line break in a name stays in the line
            return f"column '{column}' is missing (there: {there}); {task.name} needs {', '.join(columns)}"
    return None
