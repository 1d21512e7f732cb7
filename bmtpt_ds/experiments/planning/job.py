"""What is to be run: a source stage, by its model, recipe and tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.plan import Cell
from bmtpt_ds.experiments.typical_rows import source_rows
from bmtpt_ds.model_folder import Architecture
from bmtpt_ds.tasks import Task

FLOAT32 = 4  # bytes
_SAMPLES = 8  # steps whose rows are drawn


@dataclass(frozen=True)
class Job:
    """What is to be run."""

    architecture: Architecture
    recipe: Recipe
    tasks: Sequence[Task]

    @property
    def value_bytes(self) -> int:
        return 2 if self.recipe.model.dtype == "bfloat16" else FLOAT32

    @property
    def numbers(self) -> int:
        """M * L * H."""
        return self.recipe.source.particles * self.recipe.prompt.length * self.architecture.hidden_size

    @property
    def cells(self) -> int:
        """Rows times particles of a step."""
        source = self.recipe.source
        return source.particles * source.kappa * source.rows_per_task

    @cached_property
    def steps(self) -> list[list[Cell]]:
        """The cells of some steps."""
        return [self._cells_of(step) for step in range(1, _SAMPLES + 1)]

    def steps_in(self, blocks: int) -> list[list[list[Cell]]]:
        """Those of each of so many blocks of particles."""
        size = self.recipe.source.particles // blocks
        return [[[c for c in cells if c.prompt // size == block] for block in range(blocks)] for cells in self.steps]

    def _cells_of(self, step: int) -> list[Cell]:
        source, length = self.recipe.source, self.recipe.prompt.length
        drawn = [source_rows(self.recipe, self.tasks, step, p) for p in range(source.draws)]
        return [
            Cell(p, r, 1 / len(drawn[0]), length + row.source, row.target)
            for p in range(source.particles)
            for r, row in enumerate(drawn[p % source.draws])
        ]
