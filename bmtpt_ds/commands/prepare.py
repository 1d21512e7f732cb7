"""`bmtpt prepare`: a recipe's tasks read, cut into splits and tokenised, as a folder that `data.root` takes.

One process does it, with the tokenizer alone: neither a GPU nor the model's weights are needed. A run on the folder
needs no network and neither tokenises nor cuts anything; `bmtpt_ds.data.prepared` says what it checks instead.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bmtpt_ds import __version__
from bmtpt_ds.config import Recipe
from bmtpt_ds.data.prepared import (
    MANIFEST,
    TOKEN_IDS,
    Manifest,
    Prepared,
    PreparedFile,
    PreparedTask,
    definition,
    settings,
)
from bmtpt_ds.data.rows import Row
from bmtpt_ds.data.splits import Splits
from bmtpt_ds.data.tokens import RowEncoder, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.files import write_atomically
from bmtpt_ds.folders import check_out, draft_of
from bmtpt_ds.hub import find_tokenizer
from bmtpt_ds.model_folder import local_folder
from bmtpt_ds.quiet import is_first_rank, say
from bmtpt_ds.readable import readable_bytes
from bmtpt_ds.stage_inputs import every_task, read_splits
from bmtpt_ds.tasks import Task

_BATCH = 1000  # rows tokenised at once
_FILES = {f"{split}.jsonl" for split in Splits._fields}


def run_prepare(recipe: Recipe, out: Path, *, overwrite: bool) -> None:
    """Writes the source and target tasks of a recipe, all splits, into `out`.

    The folder appears under its name when it is complete: a run that is killed leaves a hidden one beside it, which the
    next takes over.

    Raises:
        UserError: a mistake in recipe, rows or model; `out` holds anything, but for a prepared folder and `overwrite`.
    """
    if not is_first_rank():
        return
    tasks = every_task(recipe)
    _check_out(out, overwrite)
    if Prepared.find(recipe.data.root):
        raise UserError(f"data.root {recipe.data.root}: prepared already; name raw rows, or none to read the hub")
    tokenizer = load_tokenizer(find_tokenizer(recipe.model.name_or_path))
    encoder = RowEncoder(tokenizer, recipe.model, recipe.data)
    for task in tasks:
        encoder.check_answers(task)
    whole = recipe.data.model_copy(update={"max_eval_rows": None})  # a recipe that reads them says how many it scores
    splits = read_splits(recipe.model_copy(update={"data": whole}), tasks)
    with draft_of(out) as draft:
        manifest = Manifest(
            model=recipe.model.name_or_path,
            tokenizer=tokenizer_digest(tokenizer),
            settings=settings(recipe),
            tasks={
                task.name: PreparedTask(
                    definition=definition(recipe, task), files=_write_task(draft / task.name, encoder, task, of_task)
                )
                for task, of_task in zip(tasks, splits, strict=True)
            },
            versions={"bmtpt_ds": __version__} | {name: version(name) for name in ("transformers", "tokenizers")},
        )
        write_atomically(draft / MANIFEST, f"{manifest.model_dump_json(indent=2)}\n".encode())
        size = sum(path.stat().st_size for path in draft.rglob("*.jsonl"))
    if cut := encoder.cut_rows():
        say(f"prepare: {cut}")
    say(f"prepare: {len(tasks)} tasks, {readable_bytes(size)} in {out}; a run takes them with --set data.root={out}")
    say(_what_else(recipe.model.name_or_path))


def _what_else(model: str) -> str:
    """What a machine without network needs besides."""
    if local_folder(model):
        return f"prepare: where there is no network, the model's folder is needed too: {model}"
    return (
        f"prepare: where there is no network, the model is needed too: hf download {model} --local-dir DIR, "
        "then --set model.name_or_path=DIR (or the same HF_HOME, once a run has filled it)"
    )


# --- the folder ------------------------------------------------------------------------------------------------------


def _check_out(out: Path, overwrite: bool) -> None:
    check_out(
        out,
        "prepare",
        "prepared tasks",
        mark=lambda folder: (folder / MANIFEST).is_file(),
        own=_is_own,
        overwrite=overwrite,
    )


def _is_own(name: Path, path: Path) -> bool:
    if len(name.parts) == 1:
        return path.is_dir() or name.name == MANIFEST
    return len(name.parts) == 2 and name.name in _FILES and path.is_file() and _holds_token_ids(path)


def _holds_token_ids(file: Path) -> bool:
    """By its first row, if it has one: raw rows may have been put beside the prepared ones, under the same names."""
    with file.open("rb") as rows:
        first = rows.readline()
    return not first or f'"{TOKEN_IDS}":'.encode() in first


# --- a task ----------------------------------------------------------------------------------------------------------


def _write_task(folder: Path, encoder: RowEncoder, task: Task, splits: Splits) -> dict[str, PreparedFile]:
    """Writes the splits of a task."""
    begin = time.perf_counter()
    folder.mkdir()
    files = {split: _write_split(folder, split, encoder, task, rows) for split, rows in splits._asdict().items()}
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits._asdict().items())
    say(f"prepare: {task.name}: {counts} rows in {time.perf_counter() - begin:.1f} s")
    return files


def _write_split(folder: Path, split: str, encoder: RowEncoder, task: Task, rows: Sequence[Row]) -> PreparedFile:
    digest = hashlib.sha256()
    with (folder / f"{split}.jsonl").open("wb") as file:
        for begin in range(0, len(rows), _BATCH):
            batch = rows[begin : begin + _BATCH]
            if any(TOKEN_IDS in row for row in batch):
                raise UserError(f"{task.name}: its rows have a column {TOKEN_IDS}: give raw rows, not prepared ones")
            lines = [
                json.dumps({**row, TOKEN_IDS: {"source": ids.source, "target": ids.target}}, separators=(",", ":"))
                for row, ids in zip(batch, encoder.encode_all(task, batch), strict=True)
            ]
            data = "".join(f"{line}\n" for line in lines).encode()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return PreparedFile(rows=len(rows), sha256=digest.hexdigest())
