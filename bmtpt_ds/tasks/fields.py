"""The fields of a task's source text: what stands behind each name, and the columns that it comes from.

A field says what keeps a row from being one of the task (`problem`: the file is wrong, and the user mends it), and what
makes a good file's row useless (`refusal`: the dataset itself is, and the row is left out and counted).
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bmtpt_ds.tasks.cells import Row, choices_problem, json_kind, text_problem


@dataclass(frozen=True)
class Field(ABC):
    """`shown: text`.

    Attributes:
        shown: the name in the source text.
    """

    shown: str

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """What the row must have."""

    @abstractmethod
    def problem(self, row: Row) -> str | None:
        """What is wrong with the row's columns, which are there; None for good ones."""

    @abstractmethod
    def text(self, row: Row) -> str | None:
        """What stands behind the name; None where this row has no such field."""

    def refusal(self, row: Row) -> str | None:
        """Why a row without a problem cannot be used, in a few words that are the same for all such rows."""
        return None


@dataclass(frozen=True)
class Text(Field):
    """A column, as it is.

    Attributes:
        column: its name; "" where it is the shown one.
        tags: whether HTML tags in it are taken out (MultiRC's paragraphs).
    """

    column: str = ""
    tags: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column or self.shown,)

    def problem(self, row: Row) -> str | None:
        return text_problem(row[self.columns[0]], f"column '{self.columns[0]}'")

    def text(self, row: Row) -> str:
        text = row[self.columns[0]]
        return " ".join(re.sub(r"<[^<>]*>", " ", text).split()) if self.tags else text


@dataclass(frozen=True)
class Listed(Field):
    """A column of several texts, with commas between them (ReCoRD's entities)."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.shown,)

    def problem(self, row: Row) -> str | None:
        values = row[self.shown]
        if not isinstance(values, list) or not values:
            return f"column '{self.shown}' must be a list of texts, not {json_kind(values)}"
        problems = (text_problem(value, f"column '{self.shown}'") for value in values)
        return next(filter(None, problems), None)

    def text(self, row: Row) -> str:
        return ", ".join(row[self.shown])


@dataclass(frozen=True)
class Choice(Field):
    """One of the texts to choose from, `choices.text`; a row may have fewer than others.

    Attributes:
        place: counted from 0.
    """

    place: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        return ("choices",)

    def problem(self, row: Row) -> str | None:
        return choices_problem(row["choices"])

    def text(self, row: Row) -> str | None:
        texts = row["choices"]["text"]
        return texts[self.place] if self.place < len(texts) else None


@dataclass(frozen=True)
class MarkedSpans(Field):
    """A text with two of its spans marked, the first *so*, the second #so# (SuperGLUE's Winograd schema challenge).

    A span is given by its text and the number of the word where it begins, counted by white space. Some rows of the
    dataset have the number a little off, or a span that differs from the text in case or punctuation: the nearest place
    that reads so is meant. A row where there is none is refused, for a mark that is missing changes the question.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return ("text", "span1_text", "span1_index", "span2_text", "span2_index")

    def problem(self, row: Row) -> str | None:
        for column in ("text", "span1_text", "span2_text"):
            if problem := text_problem(row[column], f"column '{column}'"):
                return problem
            if not row[column].strip():
                return f"column '{column}' is empty; leave the row out"
        for column in ("span1_index", "span2_index"):
            if not isinstance(row[column], int) or isinstance(row[column], bool) or row[column] < 0:
                return f"column '{column}' must be the number of a word, from 0, not {json_kind(row[column])}"
        return None

    def refusal(self, row: Row) -> str | None:
        return None if self._places(row) else "a span that is not in the text"

    def text(self, row: Row) -> str:
        text = row["text"]
        marks = [(place, mark) for span, mark in zip(self._places(row), "*#", strict=True) for place in span]
        for place, mark in sorted(marks, reverse=True):
            text = text[:place] + mark + text[place:]
        return text

    def _places(self, row: Row) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Where both spans begin and end in the text; None where one is not there, or they overlap."""
        first, second = (_find_span(row["text"], row[f"span{i}_text"], row[f"span{i}_index"]) for i in (1, 2))
        if first is None or second is None or (first[0] < second[1] and second[0] < first[1]):
            return None
        return first, second


def _find_span(text: str, span: str, near: int) -> tuple[int, int] | None:
    """First character and the one behind the last, at the place nearest to word `near` that reads as the span.

    Words are compared without case and outer punctuation; what of it the span has not stays outside.
    """
    words, wanted = list(re.finditer(r"\S+", text)), span.split()
    bare, bare_wanted = [_bare(word[0]) for word in words], [_bare(word) for word in wanted]
    starts = [i for i in range(len(words) - len(wanted) + 1) if bare[i : i + len(wanted)] == bare_wanted]
    if not starts or not any(bare_wanted):
        return None
    start = min(starts, key=lambda i: abs(i - near))
    first, last = words[start], words[start + len(wanted) - 1]
    begin = first.start() if first[0].startswith(wanted[0]) else first.start() + _core(first[0]).start()
    end = last.end() if last[0].endswith(wanted[-1]) else last.start() + _core(last[0]).end()
    return begin, end


def _core(word: str) -> re.Match:
    """A word without outer punctuation and the 's of a possessive; the whole word where nothing else is left."""
    return re.search(r"\w(?:.*?\w)?(?=(?:['’]s)?\W*$)", word) or re.match(r".*", word)


def _bare(word: str) -> str:
    return _core(word)[0].casefold()
