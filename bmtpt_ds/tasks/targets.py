"""The kinds of target that a task can have: what the decoder should write, and what its text is compared with.

Each kind answers the same questions of a row, so that a task is fields, a target and metrics. A *reference* is what a
prediction is compared with: a label's number, a number, or the accepted answers; only the metrics of the same kind
(`bmtpt_ds.tasks.metrics`) look into it.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bmtpt_ds.errors import nearest
from bmtpt_ds.tasks.cells import Row, encodable, json_kind, key_problem, short, value_at

LabelStyle = Literal["digits", "words"]
LABEL_STYLES: tuple[LabelStyle, ...] = ("digits", "words")
Kind = Literal["label", "grouped", "number", "text"]

NO_LABEL = -1  # what a text that is no label reads as


@dataclass(frozen=True)
class Target(ABC):
    """The column with the answer, and how it reads."""

    kind: ClassVar[Kind]
    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """What the row must have."""
        return (self.column,)

    @abstractmethod
    def problem(self, row: Row) -> str | None:
        """What is wrong with the row's answer, with the mend; None for a good one. The columns are there."""

    @abstractmethod
    def text(self, row: Row, labels: LabelStyle) -> str:
        """The target text of a row."""

    @abstractmethod
    def reference(self, row: Row) -> Any:
        """What a prediction for this row is compared with, for each kind the type that `is_reference` tells."""

    @abstractmethod
    def is_reference(self, value: Any) -> bool:
        """Whether `value` is what `reference` gives."""

    @abstractmethod
    def read(self, prediction: str, labels: LabelStyle) -> Any:
        """Decoded text as the metrics take it; never an error. Outer white space is dropped."""

    def answers(self, labels: LabelStyle) -> tuple[str, ...] | None:
        """Every text that the target can be; None where there is no end of them."""
        return None

    def class_of(self, row: Row) -> int:
        """The class of a row by which few shots are balanced; one class where there are none."""
        return 0


@dataclass(frozen=True)
class LabelTarget(Target):
    """A label, by its number: as a digit or as a word.

    Attributes:
        words: the labels as words, in the order of their numbers.
        by_text: rows may give a label by its word too. Where words are numbers themselves ("1" to "5" stars), a row's
            number means the word that reads so, not the label's place.
        values: what rows have instead of the number, in the order of the labels ("1" and "2" of WinoGrande).
    """

    kind = "label"
    words: tuple[str, ...]
    by_text: bool = False
    values: tuple[str, ...] | None = None

    def answers(self, labels: LabelStyle) -> tuple[str, ...]:
        if labels not in LABEL_STYLES:
            raise ValueError(f"labels must be one of {LABEL_STYLES}, got {labels!r}")
        return self.words if labels == "words" else tuple(str(i) for i in range(len(self.words)))

    def text(self, row: Row, labels: LabelStyle) -> str:
        return self.answers(labels)[self.reference(row)]

    def reference(self, row: Row) -> int:
        """The label's number."""
        value = row[self.column]
        if self.values:
            return self.values.index(value)
        if self._numbers_are_words and isinstance(value, int):
            value = str(value)
        return self.words.index(value) if isinstance(value, str) else value

    class_of = reference

    def is_reference(self, value: Any) -> bool:
        return isinstance(value, int) and 0 <= value < len(self.words)

    def read(self, prediction: str, labels: LabelStyle) -> int:
        """The label's number, NO_LABEL for any other text."""
        answers = self.answers(labels)
        text = prediction.strip()
        return answers.index(text) if text in answers else NO_LABEL

    @property
    def _numbers_are_words(self) -> bool:
        return self.by_text and any(word.lstrip("-").isdigit() for word in self.words)

    def problem(self, row: Row) -> str | None:
        value, last = row[self.column], len(self.words) - 1
        where = f"column '{self.column}' must be"
        if self.values:
            return None if value in self.values else f"{where} one of {', '.join(self.values)}, not {short(value)}"
        words = ", ".join(self.words[:10]) + (", ..." if last >= 10 else "")
        # JSON's true and false are integers to Python: as labels they are a sign of another column.
        number = isinstance(value, int) and not isinstance(value, bool)
        if self._numbers_are_words or (self.by_text and isinstance(value, str)):
            if (number or isinstance(value, str)) and str(value) in self.words:
                return None
            return f"{where} one of {words}, not {short(value)}{nearest(str(value)[:100], self.words)}"
        if not number:
            or_text = f", or one of {words}" if self.by_text else ""
            hint = f"; {value!r} is {self.words.index(value)}" if value in self.words else ""
            return f"{where} an integer from 0 to {last}{or_text}, not {json_kind(value)}{hint}"
        if not 0 <= value <= last:
            hint = "; rows without a label (-1) cannot be used, leave them out" if value == -1 else ""
            return f"{where} from 0 to {last} ({words}), not {short(value)}{hint}"
        return None


@dataclass(frozen=True)
class ChoiceTarget(LabelTarget):
    """One of a row's choices, by its place: the column has its label, a letter or a digit, as `choices.label` has them.

    Rows may have fewer choices than there are words.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, "choices")

    def reference(self, row: Row) -> int:
        return row["choices"]["label"].index(row[self.column])

    class_of = reference

    def problem(self, row: Row) -> str | None:
        labels = row["choices"]["label"]  # choices are looked at as fields
        if len(labels) > len(self.words):
            return f"column 'choices' must have at most {len(self.words)} of them, not {len(labels)}"
        if row[self.column] in labels:
            return None
        among = f"one of the row's choices, {', '.join(map(short, labels))}"
        return f"column '{self.column}' must be {among}, not {short(row[self.column])}"


@dataclass(frozen=True)
class GroupedLabelTarget(LabelTarget):
    """A label of two, of rows that belong together: several answers to one question (MultiRC).

    The reference is (label's number, name of the group).

    Attributes:
        group: the key paths that together tell the groups apart.
    """

    kind = "grouped"
    group: tuple[tuple[str, ...], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, *(path[0] for path in self.group))

    def problem(self, row: Row) -> str | None:
        return next(filter(None, (key_problem(row, path) for path in self.group)), None) or super().problem(row)

    def reference(self, row: Row) -> tuple[int, str]:
        return super().reference(row), "/".join(str(value_at(row, path)) for path in self.group)

    def class_of(self, row: Row) -> int:
        return super().reference(row)

    def text(self, row: Row, labels: LabelStyle) -> str:
        return self.answers(labels)[super().reference(row)]

    def is_reference(self, value: Any) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and super().is_reference(value[0])


@dataclass(frozen=True)
class NumberTarget(Target):
    """A number, written as it stands or rounded to the steps of a scale.

    The reference is the number that the target text states (rounded, where that is), as Compacter, ATTEMPT and MPT
    have it: the best prompt there can be scores 100.

    Attributes:
        scale: (least, greatest, step) of the numbers; None: any number.
        split: few shots are balanced over numbers below it and the rest; None: all numbers are of one class.
    """

    kind = "number"
    scale: tuple[float, float, float] | None = None
    split: float | None = None

    def answers(self, labels: LabelStyle) -> tuple[str, ...] | None:
        if self.scale is None:
            return None
        least, greatest, step = self.scale
        return tuple(f"{least + i * step:.1f}" for i in range(round((greatest - least) / step) + 1))

    def text(self, row: Row, labels: LabelStyle = "digits") -> str:
        value = row[self.column]
        if self.scale is None:
            return value.strip() if isinstance(value, str) else str(value)
        least, _, step = self.scale
        # The hub has 0.1 in 32 bits (0.100000001...), a file in 64: without the inner rounding that half step would go
        # up in one and down in the other.
        return self.answers(labels)[round(round((value - least) / step, 4))]

    def reference(self, row: Row) -> float:
        return float(self.text(row))

    def is_reference(self, value: Any) -> bool:
        return isinstance(value, float) and math.isfinite(value)

    def read(self, prediction: str, labels: LabelStyle) -> float | None:
        """The number that a text states; None for a text that is no number (nan and inf are none)."""
        return _number(prediction)

    def class_of(self, row: Row) -> int:
        return 0 if self.split is None else int(float(row[self.column]) >= self.split)

    def problem(self, row: Row) -> str | None:
        value = row[self.column]
        text_too = isinstance(value, str) and self.scale is None
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not (plain or text_too) or _number(value) is None:
            return f"column '{self.column}' must be a number, not {short(value) if text_too else json_kind(value)}"
        if self.scale and not self.scale[0] <= value <= self.scale[1]:
            hint = "; rows without a score (-1) cannot be used, leave them out" if value == -1 else ""
            return f"column '{self.column}' must be from {self.scale[0]} to {self.scale[1]}, not {short(value)}{hint}"
        return None


@dataclass(frozen=True)
class TextTarget(Target):
    """Free text with one or several accepted answers: one is trained on, all are scored against.

    Attributes:
        inner: the key of the answers where the column holds an object (SQuAD: `answers` holds `text`).
        drawn: which answer is trained on: the first, or one drawn with the row's content as the seed (ReCoRD).
    """

    kind = "text"
    inner: str | None = None
    drawn: bool = False

    def text(self, row: Row, labels: LabelStyle) -> str:
        answers = self.reference(row)
        if not self.drawn:
            return answers[0]
        digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()
        return answers[int.from_bytes(digest[:8]) % len(answers)]

    def reference(self, row: Row) -> tuple[str, ...]:
        """All accepted answers."""
        answers = self._answers(row)
        return (answers,) if isinstance(answers, str) else tuple(answers)

    def is_reference(self, value: Any) -> bool:
        return isinstance(value, tuple) and bool(value) and all(isinstance(answer, str) for answer in value)

    def read(self, prediction: str, labels: LabelStyle) -> str:
        return prediction.strip()

    def problem(self, row: Row) -> str | None:
        where = f"column '{self.column}'"
        if self.inner is not None and not (isinstance(row[self.column], Mapping) and self.inner in row[self.column]):
            return f"{where} must be an object with '{self.inner}', not {json_kind(row[self.column])}"
        answers = self._answers(row)
        if isinstance(answers, str):
            answers = [answers]
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            return f"{where} must be text or a list of texts, not {json_kind(self._answers(row))}"
        if not answers or not all(answer.strip() for answer in answers):
            return f"{where} holds {'an empty answer' if answers else 'no answer'}; give one, or leave the row out"
        if not all(map(encodable, answers)):
            return f"{where} holds half of a surrogate pair, which no tokenizer reads; remove it"
        return None

    def _answers(self, row: Row) -> Any:
        return row[self.column] if self.inner is None else row[self.column][self.inner]


def _number(text: str | float) -> float | None:
    try:
        value = float(text)
    except (ValueError, OverflowError):  # overflow: an integer of hundreds of digits
        return None
    return value if math.isfinite(value) else None
