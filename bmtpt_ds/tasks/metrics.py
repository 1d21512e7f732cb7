"""Scores of decoded text against target text, 0 to 100, and the majority baseline that stands beside every score."""

from collections import Counter
from collections.abc import Callable, Sequence

from bmtpt_ds.tasks.task import LabelStyle, Task

# scikit-learn takes a second to import, so it is imported where it is used.


def score(task: Task, predictions: Sequence[str], targets: Sequence[str], labels: LabelStyle) -> dict[str, float]:
    """Score decoded text by the task's metrics.

    Args:
        task: whose metrics to compute.
        predictions: decoded text; outer white space is dropped, and what then is no label text counts as wrong.
        targets: the true label texts, as `task.example(row, labels).target` gives them.
        labels: "digits" or "words", the form of `targets`.

    Returns:
        {metric: value from 0 to 100 (Matthews from -100)}, the headline metric first.

    Raises:
        ValueError: no rows, unequal lengths, or a target that is no label text: a fault of the caller's.
    """
    if not targets or len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets of {task.name}")
    number = {text: i for i, text in enumerate(task.label_texts(labels))}
    unknown = set(targets) - set(number)
    if unknown:
        raise ValueError(f"targets of {task.name} that are no label texts: {sorted(unknown)[:3]}")
    true = [number[text] for text in targets]
    # A text that is no label must count as wrong, also where a metric only knows two classes: it becomes the label
    # after the true one, which in the binary case is the opposite (as T5's own F1 with invalid predictions does it).
    # Any fixed label would be right by chance for some rows.
    predicted = [
        number.get(text.strip(), (answer + 1) % len(number)) for text, answer in zip(predictions, true, strict=True)
    ]
    return {name: 100.0 * METRICS[name](true, predicted) for name in task.metrics}


def majority(task: Task, targets: Sequence[str], labels: LabelStyle) -> float:
    """The headline score of always answering the most frequent target of `targets`, the split that is scored.

    Of equally frequent ones the alphabetically first is taken.
    """
    counts = Counter(targets)
    answer = min(counts, key=lambda text: (-counts[text], text), default="")
    return score(task, [answer] * len(targets), targets, labels)[task.metrics[0]]


def _accuracy(true: Sequence[int], predicted: Sequence[int]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(true, predicted))


def _f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """F1 of label 1 in a task of two classes; 0 where there is no true positive."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, pos_label=1, average="binary", zero_division=0.0))


def _matthews(true: Sequence[int], predicted: Sequence[int]) -> float:
    """Matthews correlation; 0 where either side holds one class only."""
    from sklearn.metrics import matthews_corrcoef

    # scikit-learn warns of, or cannot tell, what is undefined when a side is constant; the convention is 0.
    if len(set(true)) == 1 or len(set(predicted)) == 1:
        return 0.0
    return float(matthews_corrcoef(true, predicted))


METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
}
