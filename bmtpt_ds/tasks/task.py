"""What a task is: from a raw row with the hub's columns to the text that a text-to-text model reads and writes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks.targets import LabelStyle, LabelTarget, Target, encodable, json_kind

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
    """Text fields, a target and metrics: one task on a hub dataset or on local files.

    Attributes:
        name: the name in recipes, results, prefixes and local folders.
        hub_repository: the dataset's repository on the Hugging Face hub; None for a task of the recipe's own.
        hub_config: the configuration of that repository, None where it has only one.
        source_fields: (shown name, column) pairs, in the order in which the source text shows them.
        target: the column with the answer, and how it reads.
        metrics: names in `bmtpt_ds.tasks.metrics.METRICS[target.kind]`, the headline metric first.
        split_rule: how train, validation and test are cut from the original splits (`bmtpt_ds.data.splits`).
        sample: a short made-up row.
        folder: the local folder with its files; None: the hub, or the task's folder below `data.root`.
    """

    name: str
    hub_repository: str | None
    hub_config: str | None
    source_fields: tuple[tuple[str, str], ...]
    target: Target
    metrics: tuple[str, ...]
    split_rule: SplitRule
    sample: Mapping[str, Any] = field(compare=False)
    folder: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return (*(column for _, column in self.source_fields), self.target.column)

    def is_local(self, root: str | None) -> bool:
        """Whether the rows come from files and not from the hub, with the recipe's `data.root`."""
        return self.folder is not None or root is not None or self.hub_repository is None

    @property
    def hub_splits(self) -> tuple[str, ...]:
        """The original splits that are read from the hub, by the hub's names."""
        return HUB_SPLITS[self.split_rule]

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

    def source_text(self, row: Mapping[str, Any], prefix: bool = False) -> str:
        """The text of `example` that the encoder reads, of a row whose answer need not be known."""
        shown = [f"{name}: {row[column]}" for name, column in self.source_fields]
        return " ".join([self.name, *shown] if prefix else shown)

    def row_problem(self, row: Any) -> str | None:
        """What keeps `row` from being a row of this task, with the mend, in one line; None for a good row."""
        if not isinstance(row, dict):
            return f"not an object with named columns but {json_kind(row)}; write {{{', '.join(self.columns)}}}"
        return _missing(self, row, self.columns) or self.source_problem(row) or self.target.problem(row)

    def source_problem(self, row: Mapping[str, Any]) -> str | None:
        """As `row_problem`, of a row whose answer need not be known."""
        columns = tuple(column for _, column in self.source_fields)
        missing = _missing(self, row, columns)
        if missing:
            return missing
        for column in columns:
            if not isinstance(row[column], str):
                return f"column '{column}' must be text, not {json_kind(row[column])}"
            if not encodable(row[column]):
                return f"column '{column}' holds half of a surrogate pair, which no tokenizer reads; remove it"
        # the hub has rows with one field empty (a question of qqp); with nothing to read there is nothing to learn
        if not any(row[column].strip() for column in columns):
            return f"no text in {', '.join(map(repr, columns))}; leave the row out"
        return None


def _missing(task: Task, row: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    for column in columns:
        if column not in row:
            there = ", ".join(map(repr, list(row)[:10])) or "none"  # repr: a line break in a name stays in the line
            return f"column '{column}' is missing (there: {there}); {task.name} needs {', '.join(columns)}"
    return None
