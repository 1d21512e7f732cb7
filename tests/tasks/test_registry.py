"""The registry against the published table of tasks, and rows written as text."""

import json
import subprocess
import sys

import pytest

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, Example, get_task
from bmtpt_ds.tasks.metrics import METRICS

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
# task: (hub repository, hub config, shown fields, label words by the hub's numbers, metrics, splits)
TABLE = {
    "sst2": (GLUE, "sst2", "sentence", "negative positive", "accuracy", "large"),
    "rte": (GLUE, "rte", "sentence1 sentence2", "entailment not_entailment", "accuracy", "small"),
    "cola": (GLUE, "cola", "sentence", "unacceptable acceptable", "accuracy matthews", "small"),
    "mrpc": (GLUE, "mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1", "small"),
    "qnli": (GLUE, "qnli", "question sentence", "entailment not_entailment", "accuracy", "large"),
    "qqp": (GLUE, "qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1", "large"),
    "mnli": (GLUE, "mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy", "matched"),
    "stsb": (GLUE, "stsb", "sentence1 sentence2", None, "pearson spearman", "small"),
    "boolq": (SUPER_GLUE, "boolq", "question passage", "False True", "accuracy", "small"),
    "cb": (SUPER_GLUE, "cb", "premise hypothesis", "entailment contradiction neutral", "accuracy macro_f1", "small"),
    "wic": (SUPER_GLUE, "wic", "sentence1 sentence2 word", "False True", "accuracy", "small"),
    "squad": ("rajpurkar/squad", None, "question context", None, "f1 exact_match", "large"),
}

# The first training row as the line's preprocessing writes it (of long rows the beginning of the source).
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
    "qqp": Example(
        "question1: Where can I buy picture frames for photographic artwork in Ireland? "
        "question2: Where can I buy picture frames for photographic artwork?",
        "0",
    ),
    "mnli": Example(
        "premise: the initial regulatory flexibility analysis. hypothesis: Initial Regulatory Non-Flexibility Analysis",
        "2",
    ),
    "stsb": Example("sentence1: A plane is taking off. sentence2: An air plane is taking off.", "5.0"),
    "boolq": Example(
        "question: is ghost in the shell based on the anime passage: Ghost in the Shell -- Animation studio "
        "Production I.G has produced several different anime adaptations of Ghost in the Shell,",
        "0",
    ),
    "cb": Example(
        "premise: It was a complex language. Not written down but handed down. One might say it was peeled down. "
        "hypothesis: the language was peeled down",
        "0",
    ),
    "wic": Example(
        "sentence1: Do you want to come over to my place later? "
        "sentence2: A political system with no place for the less prominent groups. word: place",
        "0",
    ),
    "squad": Example(
        "question: For how many consecutive days did the PS3 Slim hold the number-one spot on Amazon.com? "
        "context: The PlayStation 3 Slim received extremely positive reviews as well as a boost in sales;",
        "fifteen",
    ),
}


def test_table():
    assert set(TASKS) == set(TABLE)
    for name, (repository, config, fields, words, metrics, splits) in TABLE.items():
        task = TASKS[name]
        assert task.name == name
        assert (task.hub_repository, task.hub_config) == (repository, config)
        assert list(task.source_fields) == [(field, field) for field in fields.split()]
        assert task.columns == (*fields.split(), "answers" if name == "squad" else "label")
        assert " ".join(task.metrics) == metrics
        assert set(task.metrics) <= set(METRICS[task.target.kind])
        assert task.split_rule == splits
        assert task.folder is None
        if words:
            assert task.label_texts("words") == task.answer_texts("words") == tuple(words.split())
            assert task.label_texts("digits") == tuple("012"[: len(words.split())])
    assert TASKS["mnli"].hub_splits == ("train", "validation_matched", "validation_mismatched")
    assert TASKS["sst2"].hub_splits == TASKS["cola"].hub_splits == ("train", "validation")


def test_tasks_without_labels():
    for labels in ("digits", "words"):
        tenths = [0, 2, 4, 6, 8]
        texts = [f"{whole}.{tenth}" for whole in range(5) for tenth in tenths]
        assert TASKS["stsb"].answer_texts(labels) == (*texts, "5.0")
        assert TASKS["squad"].answer_texts(labels) is None
    for name, what in (("stsb", "numbers"), ("squad", "free text")):
        message = f"task {name} has no labels but {what}: set evaluate.scoring=generate"
        for refused in (TASKS[name].check_scoring, "labels"), (TASKS[name].label_texts, "words"):
            with pytest.raises(UserError) as caught:
                refused[0](refused[1])
            assert str(caught.value) == message
        TASKS[name].check_scoring("generate")
    TASKS["cb"].check_scoring("labels")


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_rows(name):
    """What `bmtpt tasks` shows, and where a reader looks up what the columns hold."""
    task = TASKS[name]
    assert set(task.sample) == set(task.columns)
    assert task.row_problem(dict(task.sample)) is None
    assert len(task.example(task.sample).source) < 100


def test_example_labels_and_prefix():
    row = {"premise": "A b.", "hypothesis": "C  d ", "label": 1, "idx": 7}
    mnli = get_task("mnli")
    assert mnli.example(row) == ("premise: A b. hypothesis: C  d ", "1")
    assert mnli.example(row, labels="words").target == "neutral"
    assert mnli.example(row, prefix=True).source == "mnli premise: A b. hypothesis: C  d "
    assert mnli.class_of(row) == mnli.reference(row) == 1
    assert get_task("cb").example(row, labels="words").target == "contradiction"  # another order than mnli's
    with pytest.raises(ValueError, match="labels"):
        mnli.example(row, labels="letters")


@pytest.mark.shared
@pytest.mark.parametrize("name", TABLE)
def test_first_real_row(shared, name):
    with open(shared / "data" / name / "train.jsonl", encoding="utf-8") as file:
        row = json.loads(file.readline())
    task, (source, target) = get_task(name), FIRST[name]
    written, answer = task.example(row)
    whole = len(source) if name not in ("boolq", "squad") else len(written)
    assert (written[: len(source)], len(written), answer) == (source, whole, target)
    assert task.example(row, prefix=True) == (f"{name} {written}", target)
    words = task.answer_texts("words")
    in_words = words[int(target)] if words and task.target.kind == "label" else target
    assert task.example(row, labels="words") == (written, in_words)


@pytest.mark.parametrize(
    ("wrong", "right"), [("sst-2", "sst2"), ("MNLI", "mnli"), ("mrcp", "mrpc"), ("mnli_mm", "mnli"), ("sts-b", "stsb")]
)
def test_misspelt_name(wrong, right):
    with pytest.raises(UserError) as caught:
        get_task(wrong)
    assert str(caught.value) == f"unknown task '{wrong}': did you mean {right}? (known: {', '.join(TASKS)})"


def test_unknown_name_without_a_near_one():
    with pytest.raises(UserError, match=r"unknown task 'xyz' \(known: sst2, "):
        get_task("xyz")


def test_importing_tasks_brings_no_heavy_library():
    code = (
        "import sys, bmtpt_ds.tasks, bmtpt_ds.tasks.metrics, bmtpt_ds.tasks.listing; "
        "print([m for m in ('torch', 'datasets', 'sklearn', 'scipy', 'numpy', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
