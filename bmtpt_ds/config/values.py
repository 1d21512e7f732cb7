"""What a typed recipe is made from: sections, plain values from YAML, overrides; and one line for what is wrong."""

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bmtpt_ds.config.yaml_text import parse_yaml
from bmtpt_ds.errors import UserError, nearest


class Section(BaseModel):
    """A group of keys. Unknown keys, nan, inf and true / false in place of a number are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, values: Any) -> Any:
        # pydantic would read `steps: true` as 1
        if isinstance(values, dict):
            for key, value in values.items():
                field = cls.model_fields.get(key)
                if isinstance(value, bool) and field and "bool" not in str(field.annotation):
                    raise ValueError(f"{key} should not be {str(value).lower()}")
        return values


def repeated(names: Sequence[str]) -> str:
    """The names that are given more than once, as text."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def read_mapping(path: Path) -> dict:
    """The sections of a recipe file.

    Raises:
        UserError: a file that cannot be read, YAML syntax, not a mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read ({error.strerror}); mend its permissions") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(f"{path}: a recipe is a mapping of sections (model:, source:, target:, ...)")
    return values


def merged(base: dict, over: dict) -> dict:
    """`base` with the values of `over`, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def apply_override(values: dict, override: str) -> None:
    """Puts the value of a `section.key=value` text, its value in YAML, into `values`.

    Raises:
        UserError: not of that form, not YAML, a key below something that is no section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: should be key=value, for example source.lr=0.1")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict | None):
            raise UserError(f"--set {override}: {section} is not a section")
        values[section] = dict(inner or {})  # a section of its own: YAML's aliases are one and the same
        values = values[section]
    values[last] = parse_yaml(text, f"--set {override}")


def first_problem(error: ValidationError, recipe: type[BaseModel]) -> str:
    """One line for the first problem of the values of a `recipe`: which key, what is wrong, what was meant."""
    problems = error.errors()
    # a misspelt key before what is missing for want of it
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    names = [str(part) for part in problem["loc"]]
    key, section = _walk(recipe, names)
    if problem["type"] == "extra_forbidden":
        hint = nearest(names[-1], section.model_fields) or _below(names, recipe)
        hint = hint or f" (known: {', '.join(section.model_fields)})"
        return f"unknown key {'.'.join(names)}{hint}"
    if problem["type"] == "missing":
        return f"{'.'.join(key)} is missing; give it"
    # a union reports a problem for each of its members, with the member's name at the end of the location
    same = [p for p in problems if [str(n) for n in p["loc"]][: len(key)] == key]
    reasons = list(dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in same))
    got = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    text = f"{'.'.join(key) or 'recipe'}: {' or '.join(r[0].lower() + r[1:] for r in reasons)}{got}"
    if key == ["model", "dtype"]:
        text += "; T5 overflows in fp16"
    text += _mend(problem)
    return re.sub(r"a valid dictionary or instance of \w+", "a section of keys", text).replace("\n", " ")


def _below(names: list[str], recipe: type[BaseModel]) -> str:
    """The hint for a key that stands beside the sections and belongs into one of them."""
    sections = {name: field.annotation for name, field in recipe.model_fields.items() if _is_section(field.annotation)}
    places = [f"{name}.{names[0]}" for name, inner in sections.items() if names[0] in inner.model_fields]
    return f": did you mean {' or '.join(places)}?" if places and len(names) == 1 else ""


def _mend(problem: dict[str, Any]) -> str:
    """How a value of the wrong kind is written, where one can tell."""
    given, kind = problem["input"], problem["type"]
    if kind in ("list_type", "tuple_type") and not isinstance(given, dict):
        parts = re.split(r"[,\s]+", given.strip()) if isinstance(given, str) else [] if given is None else [str(given)]
        return f"; write a list, [{', '.join(parts) or 'a, b'}]"
    if kind in ("model_type", "dict_type") and isinstance(given, str) and re.match(r"\w+:\S", given):
        return "; put a space behind the colon"
    return ""


def _walk(recipe: type[BaseModel], names: list[str]) -> tuple[list[str], type[BaseModel]]:
    """The leading `names` that are keys of a recipe, and the innermost section among them."""
    keys: list[str] = []
    section, named = recipe, None  # named: of what the section that comes next is, its name being free
    for name in names:
        if named:
            section, named = named, None
        elif name in section.model_fields:
            inner = section.model_fields[name].annotation
            members = typing.get_args(inner)
            if _is_section(inner):
                section = inner
            elif typing.get_origin(inner) is dict and _is_section(members[1]):
                named = members[1]
            else:
                return [*keys, name], section
        else:
            break
        keys.append(name)
    return keys, section


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and typing.get_origin(kind) is None and issubclass(kind, BaseModel)
