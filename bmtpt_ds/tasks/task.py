"""What a task is: from a raw row with the hub's columns to the text that a text-to-text model reads and writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

LabelStyle = Literal["digits", "words"]
LABEL_STYLES: tuple[LabelStyle, ...] = ("digits", "words")
SplitRule = Literal["small", "large", "matched"]

# The original splits that each rule of data/splits.py reads from the hub. The hub's own test sets are left out:
# those of GLUE have no labels (-1).
HUB_SPLITS: dict[SplitRule, tuple[str, ...]] = {
    "small": ("train", "validation"),
    "large": ("train", "validation"),
    "matched": ("train", "validation_matched", "validation_mismatched"),
}


class Example(NamedTuple):
    """One row as text: what the encoder reads and what the decoder should write."""

    source: str
    target: str


@dataclass(frozen=True)
class Task:
    """One classification task on a hub dataset.

    Attributes:
        name: the name in recipes, results, prefixes and local folders.
        hub_repository: the dataset's repository on the Hugging Face hub.
        hub_config: the configuration of that repository, None where it has only one.
        source_fields: (shown name, column) pairs, in the order in which the source text shows them.
        label_column: the column with the label, an integer from 0.
        label_words: the labels as words, in the order of the hub's label numbers.
        metrics: names of `bmtpt_ds.tasks.metrics`, the headline metric first.
        split_rule: how train, validation and test are cut from the original splits (`bmtpt_ds.data.splits`).
    """

    name: str
    hub_repository: str
    hub_config: str | None
    source_fields: tuple[tuple[str, str], ...]
    label_column: str
    label_words: tuple[str, ...]
    metrics: tuple[str, ...]
    split_rule: SplitRule

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return (*(column for _, column in self.source_fields), self.label_column)

    @property
    def hub_splits(self) -> tuple[str, ...]:
        """The original splits that are read from the hub, by the hub's names."""
        return HUB_SPLITS[self.split_rule]

    def label_texts(self, labels: LabelStyle) -> tuple[str, ...]:
        """All target texts in the order of the label numbers: ("0", "1", ...) or the label words."""
        if labels not in LABEL_STYLES:
            raise ValueError(f"labels must be one of {LABEL_STYLES}, got {labels!r}")
        return self.label_words if labels == "words" else tuple(str(i) for i in range(len(self.label_words)))

    def class_of(self, row: Mapping[str, Any]) -> int:
        """The label number of a row."""
        return row[self.label_column]

    def example(self, row: Mapping[str, Any], labels: LabelStyle = "digits", prefix: bool = False) -> Example:
        """Write a row as text.

        The source is `name: value` for every field, joined by one space, values untouched; with `prefix` the task's
        name goes in front ("rte sentence1: ... sentence2: ..."), as ATTEMPT (Asai et al., 2022) has it.
        """
        shown = [f"{name}: {row[column]}" for name, column in self.source_fields]
        source = " ".join([self.name, *shown] if prefix else shown)
        return Example(source, self.label_texts(labels)[self.class_of(row)])

    def row_problem(self, row: Any) -> str | None:
        """What keeps `row` from being a row of this task, with the mend, in one line; None for a good row."""
        if not isinstance(row, dict):
            return f"not an object with named columns but {_kind(row)}; write {{{', '.join(self.columns)}}}"
        for column in self.columns:
            if column not in row:
                there = ", ".join(map(repr, list(row)[:10])) or "none"  # repr: a line break in a name stays in the line
                return f"column '{column}' is missing (there: {there}); {self.name} needs {', '.join(self.columns)}"
        for _, column in self.source_fields:
            if not isinstance(row[column], str):
                return f"column '{column}' must be text, not {_kind(row[column])}"
            if not _encodable(row[column]):
                return f"column '{column}' holds half of a surrogate pair, which no tokenizer reads; remove it"
        return self._label_problem(row[self.label_column])

    def _label_problem(self, label: Any) -> str | None:
        last = len(self.label_words) - 1
        # JSON's true and false are integers to Python: as labels they are a sign of another column.
        if isinstance(label, bool) or not isinstance(label, int):
            return f"column '{self.label_column}' must be an integer from 0 to {last}, not {_kind(label)}"
        if not 0 <= label <= last:
            hint = "; rows without a label (-1) cannot be used, leave them out" if label == -1 else ""
            words = ", ".join(self.label_words)
            return f"column '{self.label_column}' must be from 0 to {last} ({words}), not {label}{hint}"
        return None


def _kind(value: Any) -> str:
    """What a value is, by JSON's names and short enough for one line: a number or a truth value is shown itself."""
    if isinstance(value, str | list | dict):
        return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else type(value).__name__


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
