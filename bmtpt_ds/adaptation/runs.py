"""The runs that the target stage trains side by side, each as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from bmtpt_ds.config import Recipe, SourceConfig
from bmtpt_ds.data.order import drawn_rows, mixed_batch, mixed_rows
from bmtpt_ds.data.splits import TaskSplits


@dataclass(frozen=True)
class TargetRun:
    """One of them: a task, or with `target.multi` several, and a seed."""

    name: str  # of its folder; "" for a run that is alone
    recipe: Recipe  # of this run alone
    tasks: Sequence[TaskSplits]  # N; `train` holds the few-shot rows where the recipe asks for some
    drawn_as: SourceConfig | None = None  # a source stage, whose rows a step takes; None: batches of all tasks' rows

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
        if self.drawn_as:
            return self.drawn_as.kappa * self.drawn_as.rows_per_task
        return min(self.recipe.target.batch_size, mixed_rows(self.train_sizes))

    def draw(self, step: int) -> list[tuple[int, int]]:
        """The rows of a step, as (which task, which of its rows): a function of the run's seed and the step."""
        if source := self.drawn_as:
            return drawn_rows(self.seed, step, self.train_sizes, source.kappa, source.rows_per_task)
        return mixed_batch(self.seed, step, self.train_sizes, self.batch_size)
