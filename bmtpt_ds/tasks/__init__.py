"""The tasks: columns that make the source text, what the labels read as, how answers are scored. No tensors here."""

from bmtpt_ds.tasks.registry import TASKS, all_tasks, get_task
from bmtpt_ds.tasks.targets import LABEL_STYLES, LabelStyle
from bmtpt_ds.tasks.task import Example, Task

__all__ = ["LABEL_STYLES", "TASKS", "Example", "LabelStyle", "Task", "all_tasks", "get_task"]
