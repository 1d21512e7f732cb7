"""Properties of the metrics, whatever a model says and whatever a task's labels are: nothing crashes, nothing is given
to the wrong label, and what is right is right."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtpt_ds.config import OwnTask
from bmtpt_ds.tasks import TASKS, Task, get_task
from bmtpt_ds.tasks.metrics import majority, score

TEXT = st.one_of(
    st.text(max_size=60),  # unicode of every kind, nul and lone surrogates' neighbours included
    st.sampled_from(["", " ", "\n", "nan", "inf", "-inf", "1e999", "0", "00", "1.0", "٣", "²", "_", "a" * 5000]),
)
# what YAML lets a label be: any text without white space around it
LABEL = st.text(min_size=1, max_size=20).map(str.strip).filter(bool)


def own(**keys) -> Task:
    return get_task("mine", {"mine": OwnTask(source=["text"], target="answer", **keys)})


def scores(task: Task, said: Sequence[str], references: Sequence, labels: str = "words") -> dict[str, float]:
    found = score(task, said, references, labels)
    assert list(found) == list(task.metrics)
    lowest = {"matthews": -100.0, "pearson": -100.0, "spearman": -100.0}
    for name, value in found.items():
        assert lowest.get(name, 0.0) - 1e-9 <= value <= 100.0 + 1e-9
    return found


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_unusual_labels_are_told_apart(data) -> None:
    """A label's text is that label and no other, with white space around it too; any other text is none."""
    words = data.draw(st.lists(LABEL, min_size=2, max_size=6, unique=True))
    task = own(labels=words, metrics=["accuracy", "macro_f1"])
    true = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=1, max_size=12))
    said = [data.draw(st.one_of(st.sampled_from(words), TEXT)) for _ in true]
    right = sum(text.strip() == words[number] for text, number in zip(said, true, strict=True))
    assert scores(task, said, true)["accuracy"] == pytest.approx(100 * right / len(true))
    assert scores(task, [f" {words[number]}\n" for number in true], true) == {"accuracy": 100.0, "macro_f1": 100.0}
    most = max(true.count(number) for number in set(true))
    assert majority(task, true, "words") == pytest.approx(100 * most / len(true))


@settings(deadline=None, max_examples=30)
@given(st.data())
@pytest.mark.parametrize("name", TASKS)
def test_any_answer_to_a_built_in_task(name: str, data) -> None:
    """Scores stay in their range; perfect answers score 100; the order of the rows does not matter."""
    task = TASKS[name]
    labels = data.draw(st.sampled_from(["digits", "words"]))
    rows = [dict(task.sample) for _ in range(data.draw(st.integers(2, 6)))]
    if task.target.kind == "grouped":
        for i, row in enumerate(rows):
            row["idx"] = {"paragraph": 0, "question": i // 2, "answer": i}
    references = [task.reference(row) for row in rows]
    said = [data.draw(TEXT) for _ in rows]
    found = scores(task, said, references, labels)
    order = data.draw(st.permutations(range(len(rows))))
    again = scores(task, [said[i] for i in order], [references[i] for i in order], labels)
    assert again == pytest.approx(found)
    perfect = scores(task, [task.example(row, labels).target for row in rows], references, labels)
    # all rows are one: a correlation is of nothing, and Matthews' convention is 0
    constant = {"pearson", "spearman", "matthews"}
    assert all(value == (0.0 if metric in constant else 100.0) for metric, value in perfect.items())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=8))
def test_free_text_scores_are_means_over_rows(pairs) -> None:
    """Each row by itself, and any of its own answers is right, to the letter."""
    task = own(metrics=["exact_match", "f1"])
    said, references = [text for text, _ in pairs], [answers for _, answers in pairs]
    each = [scores(task, [text], [answers]) for text, answers in pairs]
    for name, value in scores(task, said, references).items():
        assert value == pytest.approx(sum(of_row[name] for of_row in each) / len(each))
    lasts = [answers[-1] for answers in references]
    assert scores(task, lasts, references) == {"exact_match": 100.0, "f1": 100.0}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(TEXT, st.floats(allow_nan=False, allow_infinity=False, width=32)), min_size=2, max_size=8))
def test_any_text_for_a_number(pairs) -> None:
    scores(own(metrics=["pearson", "spearman"]), [text for text, _ in pairs], [number for _, number in pairs])
