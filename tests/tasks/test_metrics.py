"""Metrics against formulas written out by counting."""

import math
import random

import pytest

from bmtpt_ds.tasks import TASKS, get_task
from bmtpt_ds.tasks.metrics import majority, score

pytestmark = pytest.mark.filterwarnings("error")


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


@pytest.mark.parametrize("labels", ["digits", "words"])
@pytest.mark.parametrize("name", TASKS)
def test_random_predictions(name, labels):
    task = get_task(name)
    texts = task.label_texts(labels)
    for seed in range(30):
        rng = random.Random(seed)
        targets = rng.choices(texts, k=rng.randint(1, 60))
        strange = ["", "  ", "maybe", "2.0", "nan", "1 1", "-1", texts[0].upper() + "x"]
        drawn = rng.choices([*texts * 4, *strange], k=len(targets))
        predictions = [f" {text} " if rng.random() < 0.3 else text for text in drawn]
        got = score(task, predictions, targets, labels)
        assert tuple(got) == task.metrics
        assert got["accuracy"] == pytest.approx(accuracy(predictions, targets))
        if "f1" in got:
            assert got["f1"] == pytest.approx(f1(*counts(predictions, targets, *texts)))
        if "matthews" in got:
            assert got["matthews"] == pytest.approx(matthews(*counts(predictions, targets, *texts)))


@pytest.mark.parametrize("name", TASKS)
def test_perfect_and_unparseable(name):
    task = get_task(name)
    targets = [*task.label_texts("words")] * 5
    assert score(task, [f"{t}\n" for t in targets], targets, "words") == dict.fromkeys(task.metrics, 100.0)
    nonsense = score(task, ["nonsense"] * len(targets), targets, "words")
    assert nonsense == {m: -100.0 if m == "matthews" else 0.0 for m in task.metrics}
    # Digits where words are asked are no labels.
    assert score(task, ["0"] * len(targets), targets, "words")["accuracy"] == 0.0


@pytest.mark.parametrize("true", "01")
def test_one_class_only(true):
    assert score(get_task("cola"), ["1"] * 4, [true] * 4, "digits")["matthews"] == 0.0
    assert score(get_task("mrpc"), ["0"] * 4, [true] * 4, "digits")["f1"] == 0.0


def test_majority():
    assert majority(get_task("rte"), ["0", "1", "1"], "digits") == pytest.approx(200 / 3)
    assert majority(get_task("mnli"), ["neutral", "neutral", "entailment", "contradiction"], "words") == 50.0
    assert majority(get_task("cola"), ["0", "1"], "digits") == 50.0


def test_caller_faults():
    rte = get_task("rte")
    for predictions, targets in ([], []), (["0"], ["0", "1"]), (["0"], ["2"]), (["0"], ["entailment"]):
        with pytest.raises(ValueError, match="rte"):
            score(rte, predictions, targets, "digits")
    with pytest.raises(ValueError, match="rte"):
        majority(rte, [], "digits")
