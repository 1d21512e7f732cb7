"""All tasks, an entry each. A new task is a new entry here and nothing else."""

import difflib

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks.task import Task

_ALL = (
    Task(
        name="sst2",
        hub_repository="nyu-mll/glue",
        hub_config="sst2",
        source_fields=(("sentence", "sentence"),),
        label_column="label",
        label_words=("negative", "positive"),
        metrics=("accuracy",),
        split_rule="large",
    ),
    Task(
        name="rte",
        hub_repository="nyu-mll/glue",
        hub_config="rte",
        source_fields=(("sentence1", "sentence1"), ("sentence2", "sentence2")),
        label_column="label",
        label_words=("entailment", "not_entailment"),
        metrics=("accuracy",),
        split_rule="small",
    ),
    Task(
        name="cola",
        hub_repository="nyu-mll/glue",
        hub_config="cola",
        source_fields=(("sentence", "sentence"),),
        label_column="label",
        label_words=("unacceptable", "acceptable"),
        metrics=("accuracy", "matthews"),  # the paper's row is accuracy, its peers' Matthews
        split_rule="small",
    ),
    Task(
        name="mrpc",
        hub_repository="nyu-mll/glue",
        hub_config="mrpc",
        source_fields=(("sentence1", "sentence1"), ("sentence2", "sentence2")),
        label_column="label",
        label_words=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        split_rule="small",
    ),
    Task(
        name="qnli",
        hub_repository="nyu-mll/glue",
        hub_config="qnli",
        source_fields=(("question", "question"), ("sentence", "sentence")),
        label_column="label",
        label_words=("entailment", "not_entailment"),
        metrics=("accuracy",),
        split_rule="large",
    ),
    Task(
        name="mnli",
        hub_repository="nyu-mll/glue",
        hub_config="mnli",
        source_fields=(("premise", "premise"), ("hypothesis", "hypothesis")),
        label_column="label",
        label_words=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        split_rule="matched",
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """The task of that name; a UserError with the nearest known name and all names where there is none."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name).lower(), TASKS, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"unknown task {str(name)!r}: {guess}Known tasks: {', '.join(TASKS)}")
