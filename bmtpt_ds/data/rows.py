"""Raw rows of a task, from the Hugging Face hub or from a local folder of JSON lines, checked before anything else."""

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bmtpt_ds.data.hub import hub_place, read_hub_splits
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import Task

Row = dict[str, Any]


class Raw(NamedTuple):
    """The rows of a task's original splits, and those that are left out."""

    rows: dict[str, list[Row]]  # by original split
    refused: Counter[str]  # by reason


def read_task(task: Task, root: str | None) -> Raw:
    """Read the raw rows of every original split that a task uses.

    Args:
        task: the task.
        root: None for the hub; else the local folder that holds `<task>/{train,validation,test}.jsonl` with the hub's
            columns (for a task of split rule "matched" also `validation_mismatched.jsonl`). A task with a folder of its
            own is read from there.

    Returns:
        rows by original split: from the hub those of `task.hub_splits`; from a folder the stems of the files that are
        there. Refused are rows that the dataset itself has spoilt, counted by the reason.

    Raises:
        UserError: one line that names the file and line (or the hub split and row) and the mend.
    """
    if not task.is_local(root):
        return _read_hub(task)
    try:
        return _read_folders(task, root)
    except OSError as error:  # no permission, a folder in a file's place, a failing disk
        path = error.filename or task.folder or root
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend the file or its permissions") from error


def _read_hub(task: Task) -> Raw:
    raw = Raw({}, Counter())
    for config in task.hub_configs:
        where, hub = hub_place(task, config), read_hub_splits(task, config)
        for split, parts in task.hub_splits.items():
            for part in parts:
                places = ((f"{where} {part}, row {i}", row) for i, row in enumerate(hub[part]))
                raw.rows.setdefault(split, []).extend(_checked(task, places, f"{where} {part}", raw.refused))
    return raw


def task_folders(task: Task, root: str | None) -> list[Path]:
    """Where a local task's files are: its own folder, else the one of its name below `root`, or several; all there."""
    own = task.folder is not None
    key, named = (f"data.tasks.{task.name}.folder", task.folder) if own else ("data.root", root)
    if named is None:
        mend = f"give data.tasks.{task.name}.folder, or data.root for {task.name} below it"
        raise UserError(f"task {task.name} is the recipe's own and has no folder; {mend}")
    folder = Path(os.path.expanduser(named))
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        mend = f"name a folder that holds {'' if own else f'{task.name}/'}train.jsonl"
        mend += ", or leave it out to read the hub" if task.hub_repository else ""
        raise UserError(f"{key}: {folder} {problem}; {mend}")
    if own:
        return [folder]
    return [_folder_below(folder, name, task) for name in task.folders or (task.name,)]


def _folder_below(root: Path, name: str, task: Task) -> Path:
    if not (root / name).is_dir() and (root / "train.jsonl").is_file():
        raise UserError(f"data.root: {root} is the folder of one task; give the one above it, which holds {name}/")
    if not (root / name).is_dir():
        raise UserError(f"{root / name} is missing: put {task.name}'s train.jsonl and validation.jsonl there")
    return root / name


def _read_folders(task: Task, root: str | None) -> Raw:
    raw = Raw({}, Counter())
    folders = task_folders(task, root)
    for folder in folders:
        for stem, path in _files(task, folder).items():
            raw.rows.setdefault(stem, []).extend(_checked(task, _lines(path), str(path), raw.refused))
    for stem in raw.rows:
        if absent := [folder for folder in folders if not os.path.lexists(folder / f"{stem}.jsonl")]:
            raise UserError(f"{absent[0] / stem}.jsonl is missing: {task.name}'s other folder has one")
    return raw


def _files(task: Task, folder: Path) -> dict[str, Path]:
    if not os.path.lexists(folder / "train.jsonl"):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        what = f"the training rows of {task.name}, a JSON object a line (there: {there})"
        raise UserError(f"{folder / 'train.jsonl'} is missing: it should hold {what}")
    stems = ["train", "validation", "test"]
    if task.split_rule == "matched":
        stems.append("validation_mismatched")
    paths = {stem: folder / f"{stem}.jsonl" for stem in stems}
    return {stem: path for stem, path in paths.items() if os.path.lexists(path)}  # a link to nothing is not left out


def read_file(task: Task, path: Path) -> list[Row]:
    """The rows of one file of JSON lines.

    Raises:
        UserError: names the line. An OSError is the caller's to explain.
    """
    return _checked(task, _lines(path), str(path), Counter())


def _checked(task: Task, rows: Iterable[tuple[str, Any]], where: str, refused: Counter[str]) -> list[Row]:
    """The rows of (place, row) pairs, each a row of the task; hub and folder go through here alike."""
    good = []
    for place, row in rows:
        problem = task.row_problem(row)
        if problem:
            raise UserError(f"{place}: {problem}")
        if reason := task.refusal(row):
            refused[reason] += 1
            continue
        good.append(row)
    if not good:
        raise UserError(f"{where}: holds no rows; {task.name} needs at least one in every split")
    return good


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("path:line number", parsed line) of every line; blank lines are tolerated at the end only."""
    blank = None
    with path.open("rb") as file:  # bytes: text mode would also end lines at a lone carriage return
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if number == 1:  # some editors and spreadsheets put a byte order mark in front
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                blank = blank or place
                continue
            if blank:
                raise UserError(f"{blank}: blank line between rows; remove it")
            yield place, _parsed(line, place)


def _parsed(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        raise UserError(f"{place}: not valid JSON ({reason}); write one whole JSON object a line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise UserError(f"{place}: cannot be parsed ({error}); write one whole JSON object a line") from error
