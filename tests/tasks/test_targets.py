"""What rows may hold as answers, and what the decoder should write for them."""

import itertools
import json

import numpy as np
import pytest

from bmtpt_ds.tasks import TASKS, get_task
from bmtpt_ds.tasks.targets import NO_LABEL, LabelTarget, NumberTarget, TextTarget


def text_of(score, name="stsb"):
    return get_task(name).example({"sentence1": "a", "sentence2": "b", "label": score}).target


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_scores_are_rounded_to_a_fifth_as_t5_does():
    """Peers round to a tenth: labels that no published model writes."""
    texts = {}
    for thousandth in range(5001):
        single = np.float32(thousandth / 1000)
        t5 = f"{float(np.rint(single * np.float32(5)) / np.float32(5)):.1f}"
        # a file holds 0.1, the hub 0.1 in 32 bits
        assert text_of(thousandth / 1000) == text_of(float(single)) == t5
        texts[t5] = abs(float(t5) - thousandth / 1000)
        assert texts[t5] <= 0.1 + 1e-9
    assert set(texts) == set(get_task("stsb").answer_texts("digits"))
    assert {text[-1] for text in texts} == set("02468")
    assert (text_of(4.25), text_of(2), text_of(0.0), text_of(5)) == ("4.2", "2.0", "0.0", "5.0")
    assert (text_of(0.1), text_of(0.3), text_of(1.1)) == ("0.0", "0.4", "1.2")  # half steps: to the even one


def test_score_classes_and_references():
    stsb = get_task("stsb")
    for score, of_class, reference in ((0.0, 0, 0.0), (2.4, 0, 2.4), (2.499, 0, 2.4), (2.5, 1, 2.4), (5.0, 1, 5.0)):
        row = {"sentence1": "a", "sentence2": "b", "label": score}
        assert (stsb.class_of(row), stsb.reference(row)) == (of_class, reference)
        assert stsb.target.read(f"{stsb.example(row).target}\n", "words") == reference


@pytest.mark.parametrize("value", [-1, -1.0, 5.1, True, "2.5", None, [2.5], float("nan"), float("inf"), 10**400])
def test_bad_scores(value):
    problem = get_task("stsb").row_problem({"sentence1": "a", "sentence2": "b", "label": value})
    assert problem.startswith("column 'label' must be ")
    assert ("leave them out" in problem) == (value == -1 and value is not True)
    assert len(problem) < 300


def test_numbers_as_they_stand():
    target = NumberTarget("x")
    for value, text in ((3, "3"), (2.50, "2.5"), ("2.50", "2.50"), (" -7 ", "-7"), ("1e3", "1e3")):
        row = {"x": value}
        assert target.problem(row) is None
        assert (target.text(row), target.reference(row)) == (text, float(text))
    for value in ("", "five", "nan", "inf", True, None, [1]):
        assert "must be a number" in target.problem({"x": value})
    assert target.answers("digits") is None
    assert target.class_of({"x": 3}) == 0


# --- labels ----------------------------------------------------------------------------------------------------------


def test_what_is_no_label_reads_as_none():
    target = LabelTarget("label", ("no", "yes"))
    assert [target.read(text, "words") for text in ("no", " yes\n", "Yes", "yes yes", "", "0")] == [
        0,
        1,
        *[NO_LABEL] * 4,
    ]
    assert [target.read(text, "digits") for text in ("0", " 1 ", "01", "yes", "2", "-1")] == [0, 1, *[NO_LABEL] * 4]


def test_labels_by_their_text():
    target = LabelTarget("stars", ("bad", "good"), by_text=True)
    for value, number in ((0, 0), (1, 1), ("bad", 0), ("good", 1)):
        assert target.problem({"stars": value}) is None
        assert target.reference({"stars": value}) == target.class_of({"stars": value}) == number
        assert target.text({"stars": value}, "words") == ("bad", "good")[number]
        assert target.text({"stars": value}, "digits") == str(number)
    for value in (2, -1, True, 1.0, None, "Good", "", "1", ["good"]):
        assert target.problem({"stars": value}) is not None
    assert target.problem({"stars": "goood"}).endswith("must be one of bad, good, not 'goood': did you mean good?")
    assert "or one of bad, good" in target.problem({"stars": 1.0})
    # only labels of one's own: on the hub a text is the sign of another column
    assert "must be an integer" in LabelTarget("stars", ("bad", "good")).problem({"stars": "good"})


def test_where_labels_are_numbers_themselves_a_number_is_the_label_that_reads_so():
    stars = LabelTarget("stars", ("1", "2", "3"), by_text=True)
    assert [stars.reference({"stars": value}) for value in (1, "1", 3, "3")] == [0, 0, 2, 2]
    assert stars.text({"stars": 3}, "words") == "3"
    for value in (0, 4, "0", True):
        assert stars.problem({"stars": value}) is not None


def test_a_long_value_does_not_fill_the_line():
    labels = LabelTarget("x", tuple(f"word{i}" for i in range(100)), by_text=True)
    assert len(labels.problem({"x": "blah " * 1000})) < 300
    assert len(labels.problem({"x": 1000})) < 300
    assert len(NumberTarget("x").problem({"x": "blah " * 1000})) < 300


# --- free text -------------------------------------------------------------------------------------------------------


def squad_row(answers):
    return {"question": "Who?", "context": "Anna.", "answers": answers}


def test_squad_trains_on_the_first_answer_and_accepts_all():
    """Peers never split the answers."""
    squad = get_task("squad")
    row = squad_row({"text": ["Anna B.", "Anna", "Anna"], "answer_start": [0, 0, 0]})
    assert squad.row_problem(row) is None
    assert squad.example(row) == squad.example(row, labels="words") == ("question: Who? context: Anna.", "Anna B.")
    assert squad.reference(row) == ("Anna B.", "Anna", "Anna")
    assert squad.class_of(row) == 0


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ({"text": []}, "holds no answer"),
        ({"text": ["Anna", " "]}, "holds an empty answer"),
        ({"text": [3]}, "text or a list of texts"),
        ({"text": None}, "not null"),
        ({"texts": ["Anna"]}, "an object with 'text'"),
        (["Anna"], "an object with 'text', not a list"),
        ({"text": ["\ud83d"]}, "surrogate"),
    ],
)
def test_bad_answers(answers, part):
    problem = get_task("squad").row_problem(squad_row(answers))
    assert problem.startswith("column 'answers' ") and part in problem


def test_plain_text_and_lists_of_it():
    target = TextTarget("summary")
    assert target.problem({"summary": "one"}) is None and target.reference({"summary": "one"}) == ("one",)
    assert target.problem({"summary": ["one", "two"]}) is None
    assert target.text({"summary": ["one", "two"]}, "digits") == "one"
    assert target.read(" one\n", "digits") == "one"
    for value in ("", " ", [], [""], 3, None, {"text": "one"}):
        assert target.problem({"summary": value}) is not None


# --- real rows -------------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("name", TASKS)
def test_every_real_row_renders(shared, name):
    if name in ("newsqa", "searchqa"):
        pytest.skip("not among the shared rows")
    task = get_task(name)
    for folder, split in itertools.product(task.folders or (name,), ("train", "validation")):
        with open(shared / "data" / folder / f"{split}.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for row in rows:
            assert task.row_problem(row) is None
            assert task.refusal(row) is None
            for labels in ("digits", "words"):
                source, target = task.example(row, labels=labels)
                possible = task.answer_texts(labels)
                assert target in (possible or task.reference(row))
                texts = [(part.shown, part.text(row)) for part in task.fields]
                assert source == " ".join(f"{shown}: {text}" for shown, text in texts if text is not None)
            assert task.target.is_reference(task.reference(row))
