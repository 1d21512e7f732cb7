"""Raw rows of a task, from the Hugging Face hub or from a local folder of JSON lines, checked before anything else."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import Task

Row = dict[str, Any]


def read_task(task: Task, root: str | None) -> dict[str, list[Row]]:
    """Read the raw rows of every original split that a task uses.

    Args:
        task: the task.
        root: None for the hub; else the local folder that holds `<task>/{train,validation,test}.jsonl` with the hub's
            columns (for a task of split rule "matched" also `validation_mismatched.jsonl`).

    Returns:
        {original split: rows}. From the hub the splits are `task.hub_splits`; from a folder the stems of the files
        that are there.

    Raises:
        UserError: one line that names the file and line (or the hub split and row) and the mend.
    """
    if root is None:
        return _read_hub(task)
    try:
        return _read_folder(task, Path(os.path.expanduser(root)))
    except OSError as error:  # no permission, a folder in a file's place, a failing disk
        path = error.filename or root
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend the file or its permissions") from error


def _read_hub(task: Task) -> dict[str, list[Row]]:
    where = task.hub_repository + (f" ({task.hub_config})" if task.hub_config else "")
    offline = f"to work offline set data.root to a folder that holds {task.name}/train.jsonl and validation.jsonl"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"reading {where} from the hub needs the package datasets: install it, or {offline}") from error
    try:
        hub = datasets.load_dataset(task.hub_repository, task.hub_config)
    except Exception as error:  # no common base: the library passes on errors of its own, httpx, fsspec and the system
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot read {where} from the Hugging Face hub ({reason}): {offline}") from error
    missing = [split for split in task.hub_splits if split not in hub]
    if missing:
        raise UserError(f"{where} on the hub has no split {', '.join(missing)} (there: {', '.join(hub)}): {offline}")
    raw = {}
    for split in task.hub_splits:
        places = ((f"{where} {split}, row {i}", row) for i, row in enumerate(hub[split]))
        raw[split] = _checked(task, places, f"{where} {split}")
    return raw


def _read_folder(task: Task, root: Path) -> dict[str, list[Row]]:
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        mend = f"name a folder that holds {task.name}/train.jsonl, or leave it out to read the hub"
        raise UserError(f"data.root: {root} {problem}; {mend}")
    folder = root / task.name
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: put {task.name}'s train.jsonl and validation.jsonl there")
    if not (folder / "train.jsonl").exists():
        raise UserError(f"{folder / 'train.jsonl'} is missing: data.root needs the training rows of {task.name}")
    stems = ["train", "validation", "test"]
    if task.split_rule == "matched":
        stems.append("validation_mismatched")
    paths = {stem: folder / f"{stem}.jsonl" for stem in stems}
    return {stem: _checked(task, _lines(path), str(path)) for stem, path in paths.items() if path.exists()}


def _checked(task: Task, rows: Iterable[tuple[str, Any]], where: str) -> list[Row]:
    """The rows of (place, row) pairs, each a row of the task; hub and folder go through here alike."""
    good = []
    for place, row in rows:
        problem = task.row_problem(row)
        if problem:
            raise UserError(f"{place}: {problem}")
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
