"""Tasks by name: the built-in ones and a recipe's own."""

from collections.abc import Mapping

from bmtpt_ds.config import OwnTask
from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.tasks.catalogue import CATALOGUE
from bmtpt_ds.tasks.own import own_task
from bmtpt_ds.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in CATALOGUE}


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
