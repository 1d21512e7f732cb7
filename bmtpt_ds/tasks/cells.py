"""What the cells of a row hold: looked at, named, told in a line."""

import json
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
MOST_CHOICES = 5


def value_at(row: Row, path: tuple[str, ...]) -> Any:
    """What lies at a path of keys."""
    for key in path:
        row = row[key]
    return row


def key_problem(row: Row, path: tuple[str, ...]) -> str | None:
    """What keeps a row from having a number or a name at a path of keys."""
    value: Any = row
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return f"column '{path[0]}' must be an object with '{'.'.join(path[1:])}', not {json_kind(row[path[0]])}"
        value = value[key]
    if not isinstance(value, int | str) or isinstance(value, bool):
        return f"{'.'.join(path)} must be a number or a text, not {json_kind(value)}"
    return None


def text_problem(value: Any, where: str) -> str | None:
    """What keeps a value from being text that a tokenizer reads."""
    if not isinstance(value, str):
        return f"{where} must be text, not {json_kind(value)}"
    if not encodable(value):
        return f"{where} holds half of a surrogate pair, which no tokenizer reads; remove it"
    return None


def choices_problem(choices: Any) -> str | None:
    """What keeps a value from being {"label": [...], "text": [...]} of two to five choices."""
    where = "column 'choices' must be"
    if not isinstance(choices, dict) or not {"label", "text"} <= choices.keys():
        return f'{where} {{"label": [...], "text": [...]}}, not {json_kind(choices)}'
    for key in ("label", "text"):
        if not isinstance(choices[key], list) or not all(isinstance(value, str) for value in choices[key]):
            return f"{where} lists of texts, and choices.{key} is none"
        if problem := next(filter(None, (text_problem(v, f"choices.{key}") for v in choices[key])), None):
            return problem
    labels, texts = choices["label"], choices["text"]
    if len(labels) != len(texts) or not 2 <= len(texts) <= MOST_CHOICES or len(set(labels)) != len(labels):
        return f"{where} 2 to {MOST_CHOICES} texts with a label each, not {len(texts)} with {len(set(labels))} labels"
    return None


def json_kind(value: Any) -> str:
    """What a value is, by JSON's names and short enough for one line: a number or a truth value is shown itself."""
    if isinstance(value, str | list | dict):
        return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool | int | float):
        return short(value, json.dumps)
    return type(value).__name__


def short(value: Any, write: Callable[[Any], str] = repr) -> str:
    text = write(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def encodable(text: str) -> bool:
    """Whether a text can be UTF-8: JSON may hold half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
