"""Scores of decoded text against what rows accept, 0 to 100, and the majority baseline that stands beside every score.

A metric compares references (`Task.reference` of the rows) with predictions as the target reads them, both of the same
kind: numbers of labels, numbers, or accepted answers and text. A prediction that is no label or no number counts as
wrong; what stands for it is said at the metrics of each kind.
"""

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bmtpt_ds.tasks.targets import NO_LABEL, Kind, LabelStyle, LabelTarget
from bmtpt_ds.tasks.task import Task

# scikit-learn and scipy take a second to import, so they are imported where they are used.

Answers = tuple[str, ...]  # all that a row accepts


def score(task: Task, predictions: Sequence[str], references: Sequence, labels: LabelStyle) -> dict[str, float]:
    """Score decoded text by the task's metrics.

    Args:
        task: whose metrics to compute.
        predictions: decoded text.
        references: what the rows accept, as `task.reference(row)` gives it.
        labels: "digits" or "words", the form in which labels were asked for.

    Returns:
        {metric: value from 0 to 100 (correlations from -100)}, the headline metric first.

    Raises:
        ValueError: no rows, unequal lengths, or references that are not the task's: a fault of the caller's.
    """
    _check_references(task, references)
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references of {task.name}")
    read = [task.target.read(text, labels) for text in predictions]
    metrics = METRICS[task.target.kind]
    return {name: 100.0 * metrics[name](references, read) for name in task.metrics}


def majority(task: Task, references: Sequence, labels: LabelStyle) -> float:
    """The headline score of one answer to every row, the most frequent in `references`, the split that is scored.

    Labels: the label of most rows. Free text: the answer, normalised, that most rows accept. Numbers: whatever the
    answer, correlations with a constant are 0. Of equally frequent ones the first, by number or by alphabet.

    Raises:
        ValueError: as `score`.
    """
    _check_references(task, references)
    if task.target.kind == "number":
        return 0.0
    if isinstance(task.target, LabelTarget):
        numbers = [reference[0] if task.target.kind == "grouped" else reference for reference in references]
        text = task.label_texts(labels)[_most_frequent(numbers)]
    else:
        text = _most_frequent(answer for answers in references for answer in set(map(_normalised, answers)))
    return score(task, [text] * len(references), references, labels)[task.metrics[0]]


def _check_references(task: Task, references: Sequence) -> None:
    strange = [reference for reference in references if not task.target.is_reference(reference)]
    if strange or not references:
        raise ValueError(f"references of {task.name} that are none of a {task.target.kind}: {strange[:3]}")


def _most_frequent(values: Iterable) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


# --- labels: numbers from 0, NO_LABEL where the prediction is no label -----------------------------------------------


def _accuracy(true: Sequence[int], predicted: Sequence[int]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(true, predicted))


def _binary_f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """F1 of label 1 of two; 0 where there is no true positive."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, _opposite(true, predicted), pos_label=1, average="binary", zero_division=0.0))


def _macro_f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """The mean of the labels' F1, over the labels that occur among the true or the predicted ones.

    A prediction that is no label is a miss of the true label and no label of its own.
    """
    from sklearn.metrics import f1_score

    occurring = sorted({*true, *predicted} - {NO_LABEL})
    return float(f1_score(true, predicted, labels=occurring, average="macro", zero_division=0.0))


def _matthews(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Matthews correlation of two labels; 0 where either side holds one label only."""
    from sklearn.metrics import matthews_corrcoef

    predicted = _opposite(true, predicted)
    # scikit-learn warns of, or cannot tell, what is undefined when a side is constant; the convention is 0.
    if len(set(true)) == 1 or len(set(predicted)) == 1:
        return 0.0
    return float(matthews_corrcoef(true, predicted))


def _opposite(true: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """Of two labels, the wrong one in place of what is no label: as a fixed one it would be right for some rows.

    T5's own F1 with invalid predictions does the same.
    """
    return [1 - t if p == NO_LABEL else p for t, p in zip(true, predicted, strict=True)]


# --- labels in groups: (number, group) against numbers; answers to one question are a group --------------------------


def _f1_of_answers(true: Sequence[tuple[int, str]], predicted: Sequence[int]) -> float:
    """F1a of SuperGLUE: F1 of label 1 over all answers of all questions."""
    return _binary_f1([label for label, _ in true], predicted)


def _exact_groups(true: Sequence[tuple[int, str]], predicted: Sequence[int]) -> float:
    """Share of the questions whose answers are all told right."""
    right: dict[str, bool] = {}
    for (label, group), answer in zip(true, predicted, strict=True):
        right[group] = right.get(group, True) and label == answer
    return sum(right.values()) / len(right)


# --- numbers: None where the prediction is no number -----------------------------------------------------------------


def _pearson(true: Sequence[float], predicted: Sequence[float | None]) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, true, predicted)


def _spearman(true: Sequence[float], predicted: Sequence[float | None]) -> float:
    """Spearman's rank correlation; 0 where either side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, true, predicted)


def _correlation(of: Callable, true: Sequence[float], predicted: Sequence[float | None]) -> float:
    # In place of what is no number stands the end of the true numbers' range that is farther from the row's own: as
    # wrong as a number there can be. A fixed one (peers take -1) is nearly right for rows at that end of the scale,
    # and the mean would make such a row count for nothing.
    least, greatest = min(true), max(true)
    farther = [greatest if t - least < greatest - t else least for t in true]
    numbers = [far if p is None else p for far, p in zip(farther, predicted, strict=True)]
    if len(set(true)) == 1 or len(set(numbers)) == 1:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of numbers that differ by little more than rounding
        value = float(of(_scaled(true), _scaled(numbers)).statistic)
    return value if math.isfinite(value) else 0.0


def _scaled(numbers: Sequence[float]) -> list[float]:
    """Numbers up to 1, to which a correlation is the same: the squares of 1e300 overflow."""
    largest = max(1.0, *map(abs, numbers))
    return [number / largest for number in numbers]


# --- free text: the accepted answers against text, as the SQuAD evaluation has it -------------------------------------


def _exact_match(true: Sequence[Answers], predicted: Sequence[str]) -> float:
    """Share of the rows where the text is an accepted answer, both normalised."""
    return _best_over_answers(lambda answer, text: float(answer == text), true, predicted)


def _word_f1(true: Sequence[Answers], predicted: Sequence[str]) -> float:
    """Mean over the rows of the F1 of words, each as often as it occurs; the greatest over the accepted answers."""
    return _best_over_answers(_overlap, true, predicted)


def _best_over_answers(of: Callable[[str, str], float], true: Sequence[Answers], predicted: Sequence[str]) -> float:
    rows = [
        max(of(_normalised(answer), _normalised(text)) for answer in answers)
        for answers, text in zip(true, predicted, strict=True)
    ]
    return sum(rows) / len(rows)


def _overlap(answer: str, text: str) -> float:
    answer_words, text_words = answer.split(), text.split()
    common = sum((Counter(answer_words) & Counter(text_words)).values())
    if not answer_words or not text_words:  # nothing is left of "The"
        return float(answer_words == text_words)
    return 2 * common / (len(answer_words) + len(text_words))


def _normalised(text: str) -> str:
    """Lower case; without punctuation, then without articles; words joined by one space."""
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_PUNCTUATION = frozenset(string.punctuation)

# --- the registry ----------------------------------------------------------------------------------------------------

Metric = Callable[[Sequence, Sequence], float]
METRICS: dict[Kind, dict[str, Metric]] = {
    "label": {"accuracy": _accuracy, "f1": _binary_f1, "macro_f1": _macro_f1, "matthews": _matthews},
    "grouped": {"f1a": _f1_of_answers, "exact_match": _exact_groups},
    "number": {"pearson": _pearson, "spearman": _spearman},
    "text": {"f1": _word_f1, "exact_match": _exact_match},
}
TWO_LABELS = ("f1", "matthews")  # of labels: those that know no more than two
