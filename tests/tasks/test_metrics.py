"""Metrics against formulas written out by counting, scikit-learn, numpy, and the SQuAD evaluation."""

import json
import math
import random

import numpy as np
import pytest
from sklearn.metrics import f1_score

from bmtpt_ds.config import OwnTask
from bmtpt_ds.tasks import TASKS, get_task
from bmtpt_ds.tasks.metrics import majority, score
from tests.tasks import squad_evaluation

pytestmark = pytest.mark.filterwarnings("error")

LABELLED = [name for name, task in TASKS.items() if task.target.kind == "label"]
STRANGE = ["", "  ", "maybe", "2.0", "nan", "1 1", "-1"]


# --- labels ----------------------------------------------------------------------------------------------------------


def counts(predictions, targets, negative, positive):
    """(tp, fp, fn, tn); a text that is neither label stands on the wrong side."""
    tp = sum(t == positive and p.strip() == positive for p, t in zip(predictions, targets, strict=True))
    tn = sum(t == negative and p.strip() == negative for p, t in zip(predictions, targets, strict=True))
    return tp, targets.count(negative) - tn, targets.count(positive) - tp, tn


def f1(tp, fp, fn, tn):
    return 100 * 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def matthews(tp, fp, fn, tn):
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return 100 * (tp * tn - fp * fn) / below if below else 0.0


def accuracy(predictions, targets):
    return 100 * sum(p.strip() == t for p, t in zip(predictions, targets, strict=True)) / len(targets)


def macro_f1(predictions, targets, texts):
    """The mean F1 of the labels that are among the targets or the predictions."""
    said = [p.strip() for p in predictions]
    each = []
    for text in {*targets, *said} & {*texts}:
        hits = sum(p == t == text for p, t in zip(said, targets, strict=True))
        each.append(200 * hits / (said.count(text) + targets.count(text)))
    return sum(each) / len(each)


@pytest.mark.parametrize("labels", ["digits", "words"])
@pytest.mark.parametrize("name", LABELLED)
def test_random_labels(name, labels):
    task = get_task(name)
    texts = task.label_texts(labels)
    for seed in range(30):
        rng = random.Random(seed)
        references = rng.choices(range(len(texts)), k=rng.randint(1, 60))
        targets = [texts[number] for number in references]
        drawn = rng.choices([*texts * 4, *STRANGE, texts[0].upper() + "x"], k=len(targets))
        predictions = [f" {text} " if rng.random() < 0.3 else text for text in drawn]
        expected = {"accuracy": accuracy(predictions, targets), "macro_f1": macro_f1(predictions, targets, texts)}
        if len(texts) == 2:
            counted = counts(predictions, targets, *texts)
            expected |= {"f1": f1(*counted), "matthews": matthews(*counted)}
        got = score(task, predictions, references, labels)
        assert tuple(got) == task.metrics
        assert got == pytest.approx({metric: expected[metric] for metric in task.metrics})


@pytest.mark.parametrize("name", LABELLED)
def test_perfect_and_unparseable_labels(name):
    task = get_task(name)
    references = [*range(len(task.label_texts("words")))] * 5
    targets = [task.label_texts("words")[i] for i in references]
    assert score(task, [f"{t}\n" for t in targets], references, "words") == dict.fromkeys(task.metrics, 100.0)
    nonsense = score(task, ["nonsense"] * len(targets), references, "words")
    assert nonsense == {m: -100.0 if m == "matthews" else 0.0 for m in task.metrics}
    # Digits where words are asked are no labels.
    assert score(task, ["0"] * len(targets), references, "words")["accuracy"] == 0.0


def test_macro_f1_is_scikit_learns_on_label_numbers():
    """Peers compared integers with strings here, which scores 0 or fails."""
    rng, cb = random.Random(0), get_task("cb")
    for _ in range(20):
        true, said = rng.choices(range(3), k=28), rng.choices(range(3), k=28)
        expected = 100 * f1_score(true, said, average="macro")
        words = cb.label_texts("words")
        assert score(cb, [str(i) for i in said], true, "digits")["macro_f1"] == pytest.approx(expected)
        assert score(cb, [words[i] for i in said], true, "words")["macro_f1"] == pytest.approx(expected)
    # no neutral row in the split, none predicted: not a label that is missed
    assert score(cb, ["0", "1"], [0, 1], "digits")["macro_f1"] == 100.0
    # what is no label is a miss of the true one and costs the others nothing
    assert score(cb, ["0", "?", "1", "2"], [0, 0, 1, 2], "digits")["macro_f1"] == pytest.approx(800 / 9)


@pytest.mark.parametrize("true", [0, 1])
def test_one_class_only(true):
    assert score(get_task("cola"), ["1"] * 4, [true] * 4, "digits")["matthews"] == 0.0
    assert score(get_task("mrpc"), ["0"] * 4, [true] * 4, "digits")["f1"] == 0.0


# --- numbers ---------------------------------------------------------------------------------------------------------


def pearson(x, y):
    return 100 * np.corrcoef(x, y)[0, 1]


def ranks(values):
    """From 1; equal values share the mean of their ranks."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_correlations():
    stsb = get_task("stsb")
    for seed in range(30):
        rng = random.Random(seed)
        true = [rng.randint(0, 25) / 5 for _ in range(rng.randint(5, 60))]
        said = [rng.choice([t, rng.randint(0, 25) / 5, -3.0, 7.5]) for t in true]
        got = score(stsb, [f" {value} " for value in said], true, "digits")
        assert tuple(got) == ("pearson", "spearman")
        assert got["pearson"] == pytest.approx(pearson(true, said))
        assert got["spearman"] == pytest.approx(pearson(ranks(true), ranks(said)))
    assert score(stsb, ["0.0", "2.6", "5.0"], [0.0, 2.6, 5.0], "digits") == pytest.approx(dict.fromkeys(got, 100.0))


@pytest.mark.parametrize("text", [*STRANGE[:3], "1 1", "nan", "inf", "-inf", "1e999", "five", "2,5"])
def test_what_is_no_number_is_as_wrong_as_can_be(text):
    stsb = get_task("stsb")
    true = [0.0, 1.0, 2.6, 4.0, 5.0]
    right = [str(value) for value in true]
    for i in range(len(true)):  # at both ends of the scale: -1, as peers have it, is nearly right for a score of 0
        predictions = [*right[:i], text, *right[i + 1 :]]
        said = [*true[:i], 5.0 if true[i] < 2.5 else 0.0, *true[i + 1 :]]
        got = score(stsb, predictions, true, "digits")
        assert got["pearson"] == pytest.approx(pearson(true, said))
        assert max(got.values()) < 90
    assert max(score(stsb, [text] * 5, true, "digits").values()) < -70


@pytest.mark.parametrize(
    ("predictions", "true"),
    [(["2.5"] * 3, [0.0, 1.0, 2.0]), (["0.0", "1.0", "?"], [3.0] * 3), (["1.0"], [1.0]), (["?"], [1.0])],
)
def test_correlation_with_a_constant_is_0(predictions, true):
    assert score(get_task("stsb"), predictions, true, "digits") == {"pearson": 0.0, "spearman": 0.0}


def test_enormous_numbers_do_not_break_a_correlation():
    for huge in ("1e308", "-1e308", "9" * 300):
        got = score(get_task("stsb"), ["0.0", huge, "5.0", huge], [0.0, 2.0, 5.0, 3.0], "digits")
        assert all(-100.0 <= value <= 100.0 for value in got.values())
    prices = get_task("prices", {"prices": OwnTask(source=["text"], target="price", metrics=["pearson"])})
    true = [1e308, -1e308, 5e307]
    assert score(prices, [str(value) for value in true], true, "digits") == pytest.approx({"pearson": 100.0})


# --- free text -------------------------------------------------------------------------------------------------------

ANSWERS = [
    "The  Eiffel Tower!",
    "eiffel tower",
    "a tower, the tower",
    "in 1889",
    "1889",
    "U.S.",
    "us",
    "e-mail",
    "é",
    "an",
]
SAID = [*ANSWERS, "", " ", "tower", "tower tower", "The", "?!", "Eiffel", "the year 1889 in Paris", "it is the U.S"]


def test_squad_scores():
    squad = get_task("squad")
    for seed in range(100):
        rng = random.Random(seed)
        references = [tuple(rng.choices(ANSWERS, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 20))]
        predictions = [rng.choice([rng.choice(answers), *SAID]) for answers in references]
        got = score(squad, predictions, references, "digits")
        assert tuple(got) == ("f1", "exact_match")
        assert got == pytest.approx(squad_evaluation.evaluate(references, predictions))


def test_squad_scores_by_hand():
    squad = get_task("squad")

    def of(prediction, *answers):
        return score(squad, [prediction], [answers], "words")

    assert of("the Denver Broncos.", "Denver Broncos", "Broncos") == {"f1": 100.0, "exact_match": 100.0}
    # every answer of its own, not the answers' list as one text: peers never split them
    assert of("Broncos", "Denver Broncos", "Broncos") == {"f1": 100.0, "exact_match": 100.0}
    assert of("Denver", "Denver Broncos", "the Broncos of Denver") == {"f1": pytest.approx(200 / 3), "exact_match": 0.0}
    assert of("['Denver Broncos', 'Broncos']", "Denver Broncos", "Broncos")["exact_match"] == 0.0
    assert of("", "Broncos") == {"f1": 0.0, "exact_match": 0.0}
    assert of("", "The") == {"f1": 100.0, "exact_match": 100.0}  # nothing is left of either


@pytest.mark.shared
def test_squad_scores_on_real_rows(shared):
    squad, rng = get_task("squad"), random.Random(0)
    with open(shared / "data/squad/validation.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    references = [squad.reference(row) for row in rows]
    part = []
    for row, answers in zip(rows, references, strict=True):
        context = row["context"].split()
        begin = rng.randrange(len(context))
        guess = " ".join(context[begin : begin + rng.randint(1, 5)])
        part.append(rng.choice([answers[0], answers[0].split()[-1], guess]))
    assert score(squad, part, references, "digits") == pytest.approx(squad_evaluation.evaluate(references, part))
    firsts = [squad.example(row).target for row in rows]
    assert score(squad, firsts, references, "digits") == {"f1": 100.0, "exact_match": 100.0}


# --- the majority baseline; callers' faults --------------------------------------------------------------------------


def multirc_by_hand(rows):
    """(F1a, EM) of (question, true, said) triples, by counting: as the SuperGLUE paper describes them."""
    tp = sum(true == said == 1 for _, true, said in rows)
    wrong = sum(true != said for _, true, said in rows)
    questions = {question for question, _, _ in rows}
    whole = sum(all(true == said for q, true, said in rows if q == question) for question in questions)
    return 200 * tp / (2 * tp + wrong) if tp else 0.0, 100 * whole / len(questions)


def test_multirc_scores_all_answers_and_whole_questions():
    draw, task = random.Random(0), get_task("multirc")
    for labels in ("digits", "words"):
        texts, rows, references, predictions = task.answer_texts(labels), [], [], []
        for _ in range(1000):
            place = {"paragraph": draw.randrange(20), "question": draw.randrange(15)}  # a number may return elsewhere
            true, said = draw.randrange(2), draw.randrange(2)
            references.append(task.reference({"label": true, "idx": place}))
            predictions.append(f" {texts[said]}" if draw.random() < 0.9 else "neither")
            rows.append((tuple(place.values()), true, said if predictions[-1] != "neither" else 1 - true))
        f1a, exact = multirc_by_hand(rows)
        found = score(task, predictions, references, labels)
        assert list(found) == ["f1a", "exact_match"]
        assert found == pytest.approx({"f1a": f1a, "exact_match": exact})
        right = [texts[label] for label, _ in references]
        assert score(task, right, references, labels) == {"f1a": 100.0, "exact_match": 100.0}


def test_majority_of_multirc_is_that_of_its_answers():
    task = get_task("multirc")
    rows = [{"label": int(i < 7), "idx": {"paragraph": 0, "question": i // 2}} for i in range(10)]
    assert majority(task, [task.reference(row) for row in rows], "digits") == pytest.approx(
        100 * f1_score([1] * 7 + [0] * 3, [1] * 10)
    )


def test_majority_label():
    assert majority(get_task("rte"), [0, 1, 1], "digits") == pytest.approx(200 / 3)
    assert majority(get_task("mnli"), [1, 1, 0, 2], "words") == 50.0
    assert majority(get_task("cola"), [0, 1], "digits") == 50.0
    own = OwnTask(source=["text"], target="label", labels=["no", "yes"], metrics=["f1"])
    assert majority(get_task("own", {"own": own}), [1, 0, 1], "digits") == pytest.approx(80.0)


def test_majority_of_numbers_and_text():
    assert majority(get_task("stsb"), [0.0, 1.0, 1.0], "digits") == 0.0
    answers = [("Paris",), ("the Paris", "Paris, France", "PARIS"), ("Rome", "paris"), ("Rome",), ("Rome",), ("rome?",)]
    # Rome of four rows, Paris of three: counted once a row, in whatever form
    assert majority(get_task("squad"), answers, "digits") == pytest.approx(400 / 6)
    assert majority(get_task("squad"), [("b c",), ("a c d",)], "digits") == pytest.approx((100 + 50) / 2)  # "b c"


@pytest.mark.parametrize(
    ("name", "predictions", "references"),
    [
        ("rte", [], []),
        ("rte", ["0"], [0, 1]),
        ("rte", ["0"], [2]),
        ("rte", ["0"], [-1]),
        ("rte", ["0"], ["0"]),
        ("cb", ["entailment"], ["entailment"]),
        ("stsb", ["1.0"], ["1.0"]),
        ("stsb", ["1.0"], [math.nan]),
        ("squad", ["a"], ["a"]),
        ("squad", ["a"], [()]),
    ],
)
def test_caller_faults(name, predictions, references):
    with pytest.raises(ValueError, match=name):
        score(get_task(name), predictions, references, "digits")
    if len(references) < 2:
        with pytest.raises(ValueError, match=name):
            majority(get_task(name), references, "digits")
