"""All tasks, an entry each. A new task is a new entry here and nothing else."""

from collections.abc import Mapping
from typing import Any

from bmtpt_ds.config import OwnTask
from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.tasks.own import own_task
from bmtpt_ds.tasks.targets import LabelTarget, NumberTarget, Target, TextTarget
from bmtpt_ds.tasks.task import SplitRule, Task

_GLUE, _SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


def _task(
    name: str,
    hub: tuple[str, str | None],
    columns: str,
    target: Target,
    metrics: str,
    splits: SplitRule,
    sample: dict[str, Any],
) -> Task:
    """A task whose text shows its columns under their own names."""
    fields = tuple((column, column) for column in columns.split())
    return Task(name, *hub, fields, target, tuple(metrics.split()), splits, sample)


def _label(*words: str) -> LabelTarget:
    return LabelTarget("label", words)


_ALL = (
    _task(
        "sst2",
        (_GLUE, "sst2"),
        "sentence",
        _label("negative", "positive"),
        "accuracy",
        "large",
        {"sentence": "a warm and funny film .", "label": 1},
    ),
    _task(
        "rte",
        (_GLUE, "rte"),
        "sentence1 sentence2",
        _label("entailment", "not_entailment"),
        "accuracy",
        "small",
        {"sentence1": "Anna sold her boat.", "sentence2": "Anna had a boat.", "label": 0},
    ),
    _task(
        "cola",
        (_GLUE, "cola"),
        "sentence",
        _label("unacceptable", "acceptable"),
        "accuracy matthews",  # the paper's row is accuracy, its peers' Matthews
        "small",
        {"sentence": "Anna are selling a boat.", "label": 0},
    ),
    _task(
        "mrpc",
        (_GLUE, "mrpc"),
        "sentence1 sentence2",
        _label("not_equivalent", "equivalent"),
        "accuracy f1",
        "small",
        {"sentence1": "Anna sold her boat .", "sentence2": "The boat was sold by Anna .", "label": 1},
    ),
    _task(
        "qnli",
        (_GLUE, "qnli"),
        "question sentence",
        _label("entailment", "not_entailment"),
        "accuracy",
        "large",
        {"question": "Who sold the boat?", "sentence": "The boat was red.", "label": 1},
    ),
    _task(
        "qqp",
        (_GLUE, "qqp"),
        "question1 question2",
        _label("not_duplicate", "duplicate"),
        "accuracy f1",
        "large",
        {"question1": "How do I sell a boat?", "question2": "How can I sell my boat?", "label": 1},
    ),
    _task(
        "mnli",
        (_GLUE, "mnli"),
        "premise hypothesis",
        _label("entailment", "neutral", "contradiction"),
        "accuracy",
        "matched",
        {"premise": "Anna sold her boat.", "hypothesis": "The boat was red.", "label": 1},
    ),
    _task(
        "stsb",
        (_GLUE, "stsb"),
        "sentence1 sentence2",
        NumberTarget("label", scale=(0.0, 5.0, 0.2), split=2.5),
        "pearson spearman",
        "small",
        {"sentence1": "Anna sold a boat.", "sentence2": "Anna bought a boat.", "label": 2.25},
    ),
    _task(
        "boolq",
        (_SUPER_GLUE, "boolq"),
        "question passage",
        _label("False", "True"),
        "accuracy",
        "small",
        {"question": "is a raft a boat", "passage": "Raft -- A raft is the simplest kind of boat.", "label": 1},
    ),
    _task(
        "cb",
        (_SUPER_GLUE, "cb"),
        "premise hypothesis",
        _label("entailment", "contradiction", "neutral"),  # not the order of mnli
        "accuracy macro_f1",
        "small",
        {"premise": "I doubt that Anna sold the boat.", "hypothesis": "Anna sold the boat.", "label": 1},
    ),
    _task(
        "wic",
        (_SUPER_GLUE, "wic"),
        "sentence1 sentence2 word",
        _label("False", "True"),
        "accuracy",
        "small",
        {"sentence1": "The bank of the river.", "sentence2": "Money in the bank.", "word": "bank", "label": 0},
    ),
    _task(
        "squad",
        ("rajpurkar/squad", None),
        "question context",
        TextTarget("answers", inner="text"),
        "f1 exact_match",
        "large",
        {"question": "Who sold the boat?", "context": "In May Anna sold it.", "answers": {"text": ["Anna"]}},
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def all_tasks(own: Mapping[str, OwnTask] | None = None) -> dict[str, Task]:
    """The built-in tasks and those of a recipe (`recipe.data.tasks`), by name.

    Raises:
        UserError: a task of the recipe has the name of a built-in one, or a metric that does not fit it.
    """
    own = own or {}
    taken = [name for name in own if name in TASKS]
    if taken:
        raise UserError(f"data.tasks.{taken[0]}: a built-in task has that name; choose another")
    return TASKS | {name: own_task(name, task) for name, task in own.items()}


def get_task(name: str, own: Mapping[str, OwnTask] | None = None) -> Task:
    """The task of that name, built-in or of a recipe (`recipe.data.tasks`).

    Raises:
        UserError: no such task, with the nearest name and all names; and as `all_tasks`.
    """
    tasks = all_tasks(own)
    if name in tasks:
        return tasks[name]
    guess = nearest(str(name).lower(), tasks)
    raise UserError(f"unknown task {str(name)!r}{guess} (known: {', '.join(tasks)})")
