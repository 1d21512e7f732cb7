"""Reading rows: the hub's names, local folders, and one line for every mistake."""

import json
import os
import sys

import datasets
import pytest

from bmtpt_ds.config import OwnTask
from bmtpt_ds.data import rows as reading
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, get_task

GOOD = [{"sentence1": "A é \u2028.", "sentence2": "B.", "label": i % 2, "idx": i} for i in range(4)]


def write(folder, split, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    if isinstance(text, list):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def message_of(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def read_task(task, root):
    """The rows; none of these is refused."""
    raw = reading.read_task(task, root)
    assert not raw.refused
    return raw.rows


def test_local_folder(tmp_path):
    write(tmp_path / "rte", "train", GOOD)
    write(tmp_path / "rte", "validation", GOOD[:2])
    write(tmp_path / "rte", "validation_mismatched", "not read for this task")
    assert read_task(get_task("rte"), str(tmp_path)) == {"train": GOOD, "validation": GOOD[:2]}
    write(tmp_path / "rte", "test", GOOD[2:])
    assert list(read_task(get_task("rte"), str(tmp_path))) == ["train", "validation", "test"]


def test_mnli_reads_the_mismatched_file(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    for split in ("train", "validation", "validation_mismatched"):
        write(tmp_path / "mnli", split, [row])
    raw = read_task(get_task("mnli"), str(tmp_path))
    assert raw == {key: [row] for key in ("train", "validation", "validation_mismatched")}


def test_home_and_line_endings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "\r\n".join(json.dumps(row) for row in GOOD) + "\r\n\r\n  \n"
    write(tmp_path / "rows" / "rte", "train", text)
    assert read_task(get_task("rte"), "~/rows")["train"] == GOOD
    write(tmp_path / "rows" / "rte", "train", text.strip())  # no line break at the end
    assert read_task(get_task("rte"), "~/rows")["train"] == GOOD


def test_one_empty_field_is_still_a_row(tmp_path):
    row = {"question1": "", "question2": "Why?", "label": 0}  # the hub's qqp has such rows
    write(tmp_path / "qqp", "train", [row])
    assert read_task(get_task("qqp"), str(tmp_path))["train"] == [row]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_mark_at_the_start(tmp_path, ending):
    text = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + ending for row in GOOD)
    path = write(tmp_path / "rte", "train", text)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert read_task(get_task("rte"), str(tmp_path))["train"] == GOOD
    write(tmp_path / "rte", "train", "\ufeff" + ending + text[1:])
    message = message_of(lambda: read_task(get_task("rte"), str(tmp_path)))
    assert message == f"{path}:1: blank line between rows; remove it"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_refused_at_their_line(tmp_path, encoding):
    path = write(tmp_path / "rte", "train", (json.dumps(GOOD[0]) + "\n").encode(encoding))
    message = message_of(lambda: read_task(get_task("rte"), str(tmp_path)))
    assert message.startswith(f"{path}:1: not ")


def own(**keys):
    keys = {"source": {"review": "text"}, "target": "stars", "labels": ["bad", "good"]} | keys
    return get_task("reviews", {"reviews": OwnTask(**keys)})


OWN_ROWS = [{"text": "Nice.", "stars": "good"}, {"text": "Awful.", "stars": 0, "id": 7}]


def test_folder_of_an_own_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my/reviews"
    for split in ("train", "validation"):
        write(folder, split, OWN_ROWS)
    raw = {"train": OWN_ROWS, "validation": OWN_ROWS}
    for name in ("my/reviews", "~/my/reviews", str(folder)):
        assert read_task(own(folder=name), None) == raw
        assert read_task(own(folder=name), "no/such/root") == raw  # its own folder, whatever data.root is
    assert read_task(own(), "my") == raw
    write(folder, "validation", [OWN_ROWS[0], {"text": "Fine.", "stars": "godo"}])
    message = message_of(lambda: read_task(own(), "my"))
    expected = "column 'stars' must be one of bad, good, not 'godo': did you mean good?"
    assert message == f"my/reviews/validation.jsonl:2: {expected}"


def test_folder_of_an_own_task_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of(lambda: read_task(own(), None)) == (
        "task reviews is the recipe's own and has no folder; "
        "give data.tasks.reviews.folder, or data.root for reviews below it"
    )
    assert message_of(lambda: read_task(own(folder="my"), None)) == (
        "data.tasks.reviews.folder: my does not exist; name a folder that holds train.jsonl"
    )
    assert message_of(lambda: read_task(own(), "my")) == (
        "data.root: my does not exist; name a folder that holds reviews/train.jsonl"
    )
    (tmp_path / "my").mkdir()
    assert message_of(lambda: read_task(own(), "my")).startswith("my/reviews is missing")
    message = message_of(lambda: read_task(own(folder="my"), None))
    assert message == (
        "my/train.jsonl is missing: it should hold the training rows of reviews, a JSON object a line (there: nothing)"
    )


GOOD_LINE = json.dumps(GOOD[0])
BAD_THIRD_LINES = {
    "torn": (GOOD_LINE[:30], ["not valid JSON", "one whole JSON object a line"]),
    "two objects": (GOOD_LINE * 2, ["not valid JSON"]),
    "list": ('["a", "b", 1]', ["a list", "sentence1, sentence2, label"]),
    "number": ("17", ["not an object", "17"]),
    "null": ("null", ["null"]),
    "deep": ("[" * 200_000, ["cannot be parsed"]),
    "huge number": ("1" * 5000, ["cannot be parsed"]),
    "no label": ('{"sentence1": "a", "sentence2": "b"}', ["'label' is missing", "'sentence1', 'sentence2'"]),
    "line break in a name": ('{"a\\nb": 1}', ["'sentence1' is missing", "a\\nb"]),
    "empty object": ("{}", ["'sentence1' is missing", "none"]),
    "text is a number": ('{"sentence1": 5, "sentence2": "b", "label": 0}', ["'sentence1' must be text, not 5"]),
    "text is null": ('{"sentence1": "a", "sentence2": null, "label": 0}', ["'sentence2' must be text, not null"]),
    "text is a list": ('{"sentence1": ["a"], "sentence2": "", "label": 0}', ["'sentence1' must be text, not a list"]),
    "no text": ('{"sentence1": "", "sentence2": " ", "label": 0}', ["no text in 'sentence1', 'sentence2'", "leave"]),
    "half a character": ('{"sentence1": "\\ud83d", "sentence2": "b", "label": 0}', ["'sentence1'", "surrogate"]),
    "label text": ('{"sentence1": "a", "sentence2": "b", "label": "1"}', ["'label' must be an integer", "text"]),
    "label bool": ('{"sentence1": "a", "sentence2": "b", "label": true}', ["'label' must be an integer", "true"]),
    "label float": ('{"sentence1": "a", "sentence2": "b", "label": 1.0}', ["'label' must be an integer", "1.0"]),
    "label nan": ('{"sentence1": "a", "sentence2": "b", "label": NaN}', ["'label' must be an integer", "NaN"]),
    "label null": ('{"sentence1": "a", "sentence2": "b", "label": null}', ["'label' must be an integer", "null"]),
    "label object": ('{"sentence1": "a", "sentence2": "b", "label": {}}', ["'label' must be an integer", "an object"]),
    "label 2": ('{"sentence1": "a", "sentence2": "b", "label": 2}', ["'label' must be from 0 to 1", "not 2"]),
    "hidden label": ('{"sentence1": "a", "sentence2": "b", "label": -1}', ["not -1", "without a label"]),
    "latin 1": ('{"sentence1": "é", "sentence2": "b", "label": 1}'.encode("latin-1"), ["not UTF-8", "as UTF-8"]),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", BAD_THIRD_LINES)
def test_bad_line(tmp_path, case, split):
    line, parts = BAD_THIRD_LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    write(tmp_path / "rte", "train", GOOD)
    path = write(tmp_path / "rte", split, GOOD_LINE.encode() + b"\n" + GOOD_LINE.encode() + b"\n" + line + b"\n")
    message = message_of(lambda: read_task(get_task("rte"), str(tmp_path)))
    assert message.startswith(f"{path}:3: ")
    for part in parts:
        assert part in message


def test_blank_line_between_rows(tmp_path):
    path = write(tmp_path / "rte", "train", f"{GOOD_LINE}\n\n \n{GOOD_LINE}\n")
    message = message_of(lambda: read_task(get_task("rte"), str(tmp_path)))
    assert message == f"{path}:2: blank line between rows; remove it"


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, text):
    write(tmp_path / "rte", "train", GOOD)
    path = write(tmp_path / "rte", "validation", text)
    assert f"{path}: holds no rows" in message_of(lambda: read_task(get_task("rte"), str(tmp_path)))


def test_missing_files_and_folders(tmp_path):
    rte = get_task("rte")
    gone = tmp_path / "gone"
    assert f"data.root: {gone} does not exist" in message_of(lambda: read_task(rte, str(gone)))
    (tmp_path / "file").write_text("x")
    assert "file is not a folder" in message_of(lambda: read_task(rte, str(tmp_path / "file")))
    assert f"{tmp_path / 'rte'} is missing" in message_of(lambda: read_task(rte, str(tmp_path)))
    write(tmp_path / "rte", "validation", GOOD)
    train = tmp_path / "rte" / "train.jsonl"
    assert f"{train} is missing" in message_of(lambda: read_task(rte, str(tmp_path)))
    train.mkdir()
    assert f"{train}: cannot be read (Is a directory)" in message_of(lambda: read_task(rte, str(tmp_path)))


@pytest.mark.parametrize("stem", ["train", "validation", "test"])
def test_a_link_to_nothing_is_no_file_that_is_left_out(tmp_path, stem):
    """An unmounted disk, a cache without its blobs: without the file other rows would be scored."""
    for split in ("train", "validation", "test"):
        write(tmp_path / "rte", split, GOOD)
    (tmp_path / "rte" / f"{stem}.jsonl").unlink()
    (tmp_path / "rte" / f"{stem}.jsonl").symlink_to(tmp_path / "gone")
    said = message_of(lambda: read_task(get_task("rte"), str(tmp_path)))
    assert f"{stem}.jsonl: cannot be read (No such file or directory)" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    write(tmp_path / "rte", "train", GOOD).chmod(0)
    assert "Permission denied" in message_of(lambda: read_task(get_task("rte"), str(tmp_path)))


@pytest.mark.shared
@pytest.mark.parametrize("name", TASKS)
def test_real_rows(shared, name):
    task = get_task(name)
    if name in ("newsqa", "searchqa"):
        pytest.skip("not among the shared rows")
    raw = read_task(task, str(shared / "data"))
    for split, rows in raw.items():
        files = [shared / "data" / folder / f"{split}.jsonl" for folder in task.folders or (name,)]
        assert len(rows) == sum(len(file.read_bytes().splitlines()) for file in files)
        classes = {"number": 2, "text": 1}.get(task.target.kind) or len(task.answer_texts("words"))
        found = {task.class_of(row) for row in rows}
        assert found == set(range(classes)) or (name, split) == ("arc", "validation")  # which has no fifth choice
    assert list(raw) == ["train", "validation"]


def hub_of(monkeypatch, splits):
    """Puts a hub in place of the real one; returns the list of what it was asked for."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    serve(monkeypatch, load_dataset)
    return asked


def serve(monkeypatch, load_dataset):
    """Puts a function in place of the library's, behind an empty cache and a hub that can be reached."""
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("bmtpt_ds.data.hub._cached", lambda task, config: None)
    monkeypatch.setattr("bmtpt_ds.hub.Repository.files", lambda self: {})


def test_hub_names(monkeypatch):
    for task in TASKS.values():
        row = dict(task.sample)
        parts = [part for names in task.hub_splits.values() for part in names]
        asked = hub_of(monkeypatch, {part: [row] for part in [*parts, "unlabelled"]})
        times = {split: len(names) * len(task.hub_configs) for split, names in task.hub_splits.items()}
        assert read_task(task, None) == {split: [row] * times[split] for split in task.hub_splits}
        assert asked == [((task.hub_repository, config), {}) for config in task.hub_configs]


def test_hub_rows_pass_the_same_checks(monkeypatch):
    hub_of(monkeypatch, {"train": GOOD, "validation": [GOOD[0], {**GOOD[1], "label": -1}]})
    message = message_of(lambda: read_task(get_task("rte"), None))
    assert message.startswith("nyu-mll/glue (rte) validation, row 1: column 'label' must be from 0 to 1")
    hub_of(monkeypatch, {"train": [{"sentence1": "a", "label": 0}], "validation": GOOD})
    message = message_of(lambda: read_task(get_task("rte"), None))
    assert message.startswith("nyu-mll/glue (rte) train, row 0: column 'sentence2' is missing")
    hub_of(monkeypatch, {"train": GOOD})
    assert "has no split validation (there: train)" in message_of(lambda: read_task(get_task("rte"), None))


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), ValueError("no config"), FileNotFoundError("gone")])
def test_hub_failure(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    serve(monkeypatch, load_dataset)
    message = message_of(lambda: read_task(get_task("mrpc"), None))
    assert message.startswith("mrpc: nyu-mll/glue (mrpc): the download from the hub (https://")
    reason = str(error).partition("\n")[0]
    assert f"broke off ({type(error).__name__}: {reason}): start again" in message
    assert "set data.root to a folder that holds mrpc/train.jsonl and validation.jsonl" in message


def test_offline_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = message_of(lambda: read_task(get_task("mrpc"), None))
    assert "needs the package datasets: install it" in message and "data.root" in message


def test_offline_mode_of_the_real_library(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "nyu-mll/glue (cola)" in message_of(lambda: read_task(get_task("cola"), None))
