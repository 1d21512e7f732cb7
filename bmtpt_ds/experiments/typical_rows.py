"""How long the tasks' rows are, for profiles and plans on machines that have no rows. No torch.

Tokens by T5's vocabulary (SentencePiece, flan-t5-small's), end-of-sequence included, digits as labels, nothing cut:
measured in November 2026 on up to 400 rows of each task as on the hub, training and validation mixed (40 of record, 104
of hotpotqa). newsqa and searchqa were not at hand: their passages are longer than the 512 tokens that the tasks keep.
The numbers of a row's tokens are taken to be log-normal.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.order import drawn_rows, stream
from bmtpt_ds.tasks import Task

FREE_TEXT = 32  # tokens that a target may have whose texts have no end
_LABEL = 6  # likewise of one that is a label or a number
_LEAST = 4  # tokens
ROWS = 10_000  # of a task


class Lengths(NamedTuple):
    """Of a task's rows."""

    source: float  # tokens of the text: the median
    spread: float  # standard deviation of their logarithm
    target: float  # tokens of the target: the mean


class Row(NamedTuple):
    """Tokens of one row, the prompt not among them."""

    source: int
    target: int


TYPICAL = {
    "agnews": Lengths(59, 0.28, 2.3),
    "anli": Lengths(104, 0.17, 2.3),
    "arc": Lengths(59, 0.37, 2.3),
    "boolq": Lengths(141, 0.49, 2.4),
    "cb": Lengths(86, 0.43, 2.5),
    "cola": Lengths(12, 0.32, 2.3),
    "commonsenseqa": Lengths(43, 0.17, 2.2),
    "hotpotqa": Lengths(218, 0.35, 4.8),
    "mnli": Lengths(43, 0.45, 2.4),
    "mrpc": Lengths(65, 0.26, 2.4),
    "multirc": Lengths(373, 0.39, 2.6),
    "newsqa": Lengths(700, 0.3, 5.0),
    "nq": Lengths(123, 0.39, 4.7),
    "openbookqa": Lengths(42, 0.26, 2.3),
    "paws": Lengths(66, 0.27, 2.6),
    "qnli": Lengths(54, 0.33, 2.5),
    "qqp": Lengths(35, 0.33, 2.7),
    "record": Lengths(326, 0.17, 4.1),
    "rte": Lengths(78, 0.49, 2.5),
    "scitail": Lengths(45, 0.29, 2.5),
    "searchqa": Lengths(700, 0.3, 4.0),
    "squad": Lengths(188, 0.39, 5.8),
    "sst2": Lengths(14, 0.66, 2.5),
    "stsb": Lengths(32, 0.37, 3.0),
    "wic": Lengths(29, 0.21, 2.5),
    "winogrande": Lengths(36, 0.13, 2.5),
    "wsc": Lengths(35, 0.45, 2.6),
    "yelp": Lengths(87, 0.76, 2.5),
}
OTHERS = Lengths(60, 0.4, 2.5)  # tasks of a user's own: about the median task


def longest_row(recipe: Recipe, tasks: Sequence[Task]) -> Row:
    """What a row of these tasks may have at most, the prompt not counted: what memory is set aside for."""
    free = any(_lengths(task).target > 3.5 for task in tasks)
    return Row(max(_most(recipe, task) for task in tasks), FREE_TEXT if free else _LABEL)


def source_rows(recipe: Recipe, tasks: Sequence[Task], step: int, particle: int = 0) -> list[Row]:
    """The kappa * R rows that a particle reads in a step of the source stage, a function of the recipe's seed, the step
    and, where particles draw rows of their own, the particle."""
    source, sizes = recipe.source, {task.name: ROWS for task in tasks}
    drawn = drawn_rows(recipe.run.seed, step, sizes, source.kappa, source.rows_per_task, particle)
    return [draw_row(recipe, tasks[k], i) for k, i in drawn]


def draw_row(recipe: Recipe, task: Task, i: int) -> Row:
    """Row i of a task."""
    lengths, draw = _lengths(task), stream("typical row", task.name, i)
    source = round(lengths.source * math.exp(lengths.spread * draw.standard_normal()))
    target = min(2 + draw.poisson(lengths.target - 2), longest_row(recipe, [task]).target)
    return Row(max(_LEAST, min(source, _most(recipe, task))), int(target))


def _lengths(task: Task) -> Lengths:
    return TYPICAL.get(task.name, OTHERS)


def _most(recipe: Recipe, task: Task) -> int:
    asked = recipe.model.max_source_length
    return task.max_source_length if asked == "auto" else asked
