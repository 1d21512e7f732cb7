"""The registry against the published table of tasks, and rows written as text."""

import json
import subprocess
import sys

import pytest

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, Example, get_task

# task: (hub repository, hub config, shown fields, label words by the hub's numbers, metrics)
TABLE = {
    "sst2": ("nyu-mll/glue", "sst2", ["sentence"], ["negative", "positive"], ["accuracy"]),
    "rte": ("nyu-mll/glue", "rte", ["sentence1", "sentence2"], ["entailment", "not_entailment"], ["accuracy"]),
    "cola": ("nyu-mll/glue", "cola", ["sentence"], ["unacceptable", "acceptable"], ["accuracy", "matthews"]),
    "mrpc": ("nyu-mll/glue", "mrpc", ["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ["accuracy", "f1"]),
    "qnli": ("nyu-mll/glue", "qnli", ["question", "sentence"], ["entailment", "not_entailment"], ["accuracy"]),
    "mnli": (
        "nyu-mll/glue",
        "mnli",
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        ["accuracy"],
    ),
}

# The first training row as the line's preprocessing writes it.
FIRST = {
    "sst2": Example("sentence: the little nuances ", "0"),
    "rte": Example(
        "sentence1: No Weapons of Mass Destruction Found in Iraq Yet. "
        "sentence2: Weapons of Mass Destruction Found in Iraq.",
        "1",
    ),
    "cola": Example("sentence: Our friends won't buy this analysis, let alone the next one we propose.", "1"),
    "mrpc": Example(
        'sentence1: Amrozi accused his brother , whom he called " the witness " , of deliberately distorting his '
        'evidence . sentence2: Referring to him as only " the witness " , Amrozi accused his brother of deliberately '
        "distorting his evidence .",
        "1",
    ),
    "qnli": Example(
        "question: What was distinctly made by Nintendo, Konami, and Acclaim? "
        "sentence: All licensed US cartridges were made by Nintendo, Konami and Acclaim.",
        "0",
    ),
    "mnli": Example(
        "premise: the initial regulatory flexibility analysis. hypothesis: Initial Regulatory Non-Flexibility Analysis",
        "2",
    ),
}


def test_table():
    assert set(TASKS) == set(TABLE)
    for name, (repository, config, fields, words, metrics) in TABLE.items():
        task = TASKS[name]
        assert task.name == name
        assert (task.hub_repository, task.hub_config) == (repository, config)
        assert list(task.source_fields) == [(field, field) for field in fields]
        assert task.columns == (*fields, "label")
        assert task.label_texts("words") == tuple(words)
        assert task.label_texts("digits") == tuple("012"[: len(words)])
        assert list(task.metrics) == metrics
    assert {name: task.split_rule for name, task in TASKS.items()} == {
        "cola": "small", "mrpc": "small", "rte": "small", "qnli": "large", "sst2": "large", "mnli": "matched",
    }  # fmt: skip
    assert TASKS["mnli"].hub_splits == ("train", "validation_matched", "validation_mismatched")
    assert TASKS["sst2"].hub_splits == TASKS["cola"].hub_splits == ("train", "validation")


def test_example_labels_and_prefix():
    row = {"premise": "A b.", "hypothesis": "C  d ", "label": 1, "idx": 7}
    mnli = get_task("mnli")
    assert mnli.example(row) == ("premise: A b. hypothesis: C  d ", "1")
    assert mnli.example(row, labels="words").target == "neutral"
    assert mnli.example(row, prefix=True).source == "mnli premise: A b. hypothesis: C  d "
    assert mnli.class_of(row) == 1
    with pytest.raises(ValueError, match="labels"):
        mnli.example(row, labels="letters")


@pytest.mark.shared
@pytest.mark.parametrize("name", TABLE)
def test_first_real_row(shared, name):
    with open(shared / "data" / name / "train.jsonl", encoding="utf-8") as file:
        row = json.loads(file.readline())
    task, (source, target) = get_task(name), FIRST[name]
    assert task.example(row) == (source, target)
    assert task.example(row, prefix=True) == (f"{name} {source}", target)
    assert task.example(row, labels="words") == (source, task.label_words[int(target)])


@pytest.mark.parametrize(
    ("wrong", "right"), [("sst-2", "sst2"), ("MNLI", "mnli"), ("mrcp", "mrpc"), ("mnli_mm", "mnli")]
)
def test_misspelt_name(wrong, right):
    with pytest.raises(UserError) as caught:
        get_task(wrong)
    message = str(caught.value)
    assert message == f"unknown task '{wrong}': did you mean '{right}'? Known tasks: {', '.join(TASKS)}"


def test_unknown_name_without_a_near_one():
    with pytest.raises(UserError, match="unknown task 'xyz': Known tasks: sst2, "):
        get_task("xyz")


def test_importing_tasks_brings_no_heavy_library():
    code = (
        "import sys, bmtpt_ds.tasks, bmtpt_ds.tasks.metrics; "
        "print([m for m in ('torch', 'datasets', 'sklearn', 'numpy', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
