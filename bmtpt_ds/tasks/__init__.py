"""The tasks: columns that make the source text, what the labels read as, how answers are scored. No tensors here."""

from bmtpt_ds.tasks.registry import TASKS, get_task
from bmtpt_ds.tasks.task import LABEL_STYLES, Example, Task

__all__ = ["LABEL_STYLES", "TASKS", "Example", "Task", "get_task"]
