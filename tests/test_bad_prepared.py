"""Mistakes about prepared rows: another recipe's, damaged ones, and folders that may not be written.

A case breaks one thing of a command that would work; it returns the command line and what its one line must hold.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bmtpt_ds.data.prepared import MANIFEST
from tests import toy
from tests.mistakes import Bench, Cases, assert_refused

case = Cases()

# --- rows of another recipe ------------------------------------------------------------------------------------------


def other_recipe(name: str, setting: str, *expected: str) -> None:
    """A case that is one `--set` beside the prepared rows."""

    def make(b: Bench):
        out, named = b.prepared()
        return b.source(*named, "--set", setting), [f"data.root {out}: ", *expected, "bmtpt prepare"]

    case[name] = make


other_recipe("labels", "data.labels=words", 'with data.labels = "digits"', 'has "words"', "--set 'data.labels=")
other_recipe("prefix", "data.prefix=true", "with data.prefix = false", "has true", "--set 'data.prefix=false'")
other_recipe("source_length", "model.max_source_length=31", "model.max_source_length = 32", "has 31")
other_recipe("target_length", "model.max_target_length=3", 'model.max_target_length = "auto"', "has 3")
other_recipe("split_seed", "data.split_seed=1", "data.split_seed = 42", "has 1")
other_recipe("task_not_prepared", "source.tasks=[sst2, rte]", "rte is not prepared, sst2, cola, mrpc are")


@case
def another_tokenizer(b: Bench):
    out, named = b.prepared()
    model, model_named = b.model()
    toy.make_tokenizer(model, vocab=95)
    expected = [f"data.root {out}: tokenised for {b.untied}", f"model.name_or_path {model} has another"]
    return b.source(*named, *model_named), expected


@case
def a_tokenizer_of_the_same_words_that_cuts_otherwise(b: Bench):
    out, named = b.prepared()
    model, model_named = b.model()
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    return b.source(*named, *model_named), [f"data.root {out}: its token ids of sst2", "transformers"]


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(name: str, damage: Callable[[Path], object], *expected: str) -> None:
    """A case that does `damage` to a prepared folder."""

    def make(b: Bench):
        out, named = b.prepared()
        damage(out)
        return b.source(*named), [str(out), *expected]

    case[name] = make


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


damaged("file_altered", lambda out: flip(out / "cola/train.jsonl"), "cola/train.jsonl: damaged", "SHA-256")
damaged("file_truncated", lambda out: os.truncate(out / "cola/test.jsonl", 99), "cola/test.jsonl: damaged")
damaged("file_missing", lambda out: (out / "sst2/test.jsonl").unlink(), "sst2/test.jsonl", "copy the prepared")
damaged("manifest_torn", lambda out: os.truncate(out / MANIFEST, 99), MANIFEST, "torn", "copy the folder again")
damaged("manifest_of_old", lambda out: (out / MANIFEST).write_text('{"format": 0}'), MANIFEST, "another version")


@case
def evaluate_with_rows_of_another_recipe(b: Bench):
    out, named = b.prepared()
    return b.evaluate(*named, "--set", "data.labels=words"), [f"data.root {out}", "data.labels"]


# --- prepare ---------------------------------------------------------------------------------------------------------


@case
def out_holds_other_files(b: Bench):
    b.out.mkdir()
    (b.out / "thesis.tex").write_text("years of work")
    return b.prepare("--overwrite"), [f"--out {b.out}", "has not written", "give a new folder"]


@case
def out_is_prepared(b: Bench):
    out, _ = b.prepared()
    return b.prepare(), [f"--out {out}: holds prepared tasks", "--overwrite"]


@case
def out_is_prepared_and_holds_other_files(b: Bench):
    out, _ = b.prepared()
    (out / "sst2/notes.txt").write_text("mine")
    return b.prepare("--overwrite"), [f"--out {out}: holds sst2/notes.txt", "move it away"]


@case
def out_is_prepared_and_holds_raw_rows(b: Bench):
    out, _ = b.prepared()
    shutil.copytree(b.rows / "rte", out / "reviews")  # where a task of the recipe's own has them by default
    return b.prepare("--overwrite"), [f"--out {out}: holds reviews/train.jsonl", "move it away"]


@case
def out_is_the_raw_rows(b: Bench):
    b.out, named = b.data()
    return b.prepare(*named, "--overwrite"), [f"--out {b.out}", "has not written"]


@case
def out_is_a_file(b: Bench):
    b.file("prepared", "not a folder")
    return b.prepare(), [f"--out {b.out}: that is a file", "give a folder"]


@case
def out_in_proc(b: Bench):
    b.out = Path("/proc/bmtpt/out")
    return b.prepare(), ["--out /proc/bmtpt/out", "cannot be written"]


@case
def out_not_ours(b: Bench):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    locked = b.folder / "locked"
    locked.mkdir(mode=0o500)
    b.out = locked / "out"
    return b.prepare(), [f"{locked} cannot be written", "give a folder of yours"]


@case
def prepared_twice(b: Bench):
    out, named = b.prepared()
    b.out = b.folder / "again"
    return b.prepare(*named), [f"data.root {out}: prepared already", "raw rows"]


@case
def prepared_twice_without_its_manifest(b: Bench):
    out, named = b.prepared()
    (out / MANIFEST).unlink()
    b.out = b.folder / "again"
    return b.prepare(*named), ["sst2", "a column _token_ids", "raw rows"]


@case
def model_without_tokenizer(b: Bench):
    model, named = b.model()
    (model / "tokenizer.json").unlink()
    return b.prepare(*named), [f"{model}: no tokenizer there", "tokenizer.json or spiece.model"]


@case
def tokenizer_of_a_larger_model(b: Bench):
    model, named = b.model()
    toy.make_tokenizer(model, vocab=200)
    return b.prepare(*named), [str(model), "tokenizer has 200 tokens, the model 96"]


@case
def label_words_that_the_tokenizer_lacks(b: Bench):
    words = ["--set", "data.labels=words", "--set", "target.tasks=[boolq]"]
    return b.prepare(*words), ["task boolq", "'False'", "set data.labels=digits"]


@case
def model_missing(b: Bench):
    return b.prepare("--set", "model.name_or_path=./nowhere"), ["model.name_or_path ./nowhere: no such folder"]


@case
def task_misspelt(b: Bench):
    return b.prepare("--set", "target.tasks=[mrcp]"), ["unknown task 'mrcp'", "did you mean mrpc?"]


@case
def rows_missing(b: Bench):
    root, named = b.data()
    shutil.rmtree(root / "cola")
    return b.prepare(*named), [f"{root / 'cola'} is missing"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)
