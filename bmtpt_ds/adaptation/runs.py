"""The runs that the target stage trains side by side, each as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.order import mixed_rows
from bmtpt_ds.data.splits import TaskSplits


@dataclass(frozen=True)
class TargetRun:
    """One of them: a task, or with `target.multi` several, and a seed."""

    name: str  # of its folder; "" for a run that is alone
    recipe: Recipe  # of this run alone
    tasks: Sequence[TaskSplits]  # N; `train` holds the few-shot rows where the recipe asks for some

    @property
    def seed(self) -> int:
        return self.recipe.run.seed

    @property
    def train_sizes(self) -> dict[str, int]:
        """Rows to train on, by task."""
        return {task.name: len(splits.train) for task, splits in self.tasks}

    @property
    def batch_size(self) -> int:
        """Rows of a step: never more than there are."""
        return min(self.recipe.target.batch_size, mixed_rows(self.train_sizes))
