"""What `bmtpt tasks` prints: each task's rows, columns, answers, metrics and splits, and an example of its text."""

import textwrap
from collections.abc import Mapping, Sequence

from bmtpt_ds.config import OwnTask
from bmtpt_ds.tasks.registry import all_tasks, get_task
from bmtpt_ds.tasks.targets import ChoiceTarget, LabelTarget, NumberTarget, TextTarget
from bmtpt_ds.tasks.task import SplitRule, Task

WIDTH = 100  # columns
_INDENT = " " * 10

_SPLITS: dict[SplitRule, str] = {
    "small": "validation is half of the hub's {validation} set, test the other half",
    "large": "validation is 10% of the hub's {train} set, at most 1000 rows; test is the hub's {validation} set",
    "matched": "validation is the hub's mismatched set, test its matched one",
    "own": "the hub's own",
}
_OWN_SPLITS = (
    "the files as they are; where test.jsonl is missing, half of the validation rows; where validation.jsonl is, "
    "10% of the training rows, at most 1000"
)


def list_tasks(names: Sequence[str] = (), own: Mapping[str, OwnTask] | None = None) -> str:
    """A paragraph a task, at most 100 columns wide.

    Args:
        names: the tasks to list, in this order; default: all.
        own: a recipe's own tasks, `recipe.data.tasks`.

    Raises:
        UserError: no such task; a task of the recipe's own that cannot be.
    """
    tasks = [get_task(name, own) for name in dict.fromkeys(names)] if names else all_tasks(own).values()
    return "\n\n".join(map(_paragraph, tasks))


def _paragraph(task: Task) -> str:
    configs = ", ".join(filter(None, task.hub_configs))
    hub = f"{task.hub_repository}{f' ({configs})' if configs else ''} on the hub"
    where = hub if task.hub_repository else f"the recipe's own, in {task.folder or f'<data.root>/{task.name}'}"
    lines = {
        "columns": ", ".join(task.columns),
        "answers": _answers(task),
        "metrics": ", ".join(task.metrics),
        "length": f"{task.max_source_length} tokens of text with model.max_source_length: auto",
        "splits": _splits(task) if task.hub_repository else _OWN_SPLITS,
        "example": task.example(task.sample).source,
        "": _targets(task),
    }
    return "\n".join([f"{task.name}: {where}", *(_wrapped(f"  {name:<8}", text) for name, text in lines.items())])


def _splits(task: Task) -> str:
    names = {split: ", ".join(parts) for split, parts in task.hub_splits.items()}
    if names["train"] == "train":
        names["train"] = "training"
    whole = f", cut between {task.group[-1]}s" if task.group else ""
    most = f"; at most {task.most_train:,} rows are trained on" if task.most_train else ""
    return _SPLITS[task.split_rule].format_map(names) + whole + most


def _answers(task: Task) -> str:
    match task.target:
        case ChoiceTarget(words=words):
            places = ", ".join(f"{i} {word}" for i, word in enumerate(words))
            return f"the place of {task.target.column} among the choices: {places}"
        case LabelTarget(words=words):
            return ", ".join(f"{i} {word}" for i, word in enumerate(words))
        case NumberTarget(scale=(least, greatest, step)):
            return f"a number from {least} to {greatest} in steps of {step}"
        case NumberTarget():
            return "a number, as it stands"
        case TextTarget(column=column, inner=inner, drawn=drawn):
            which, where = "one drawn" if drawn else "the first", f"{column}.{inner}" if inner else column
            return f"free text, {which} of {where}; all of them are accepted"
    raise TypeError(f"no words for {task.target}")


def _targets(task: Task) -> str:
    digits, words = (task.example(task.sample, labels=style).target for style in ("digits", "words"))
    return f"-> {digits}" if digits == words else f"-> {digits} (data.labels: digits) or {words} (words)"


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=_INDENT, break_on_hyphens=False)
