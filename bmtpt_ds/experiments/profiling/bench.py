"""What a profile is made on: a loaded model and rows, real ones or, with random weights, of typical lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.commands.pipeline import target_run
from bmtpt_ds.config import Recipe
from bmtpt_ds.data.splits import Splits, TaskSplits
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.experiments import typical_rows
from bmtpt_ds.parallel import Ranks, random_backbone
from bmtpt_ds.session import Session, load_rows, open_session, settle_activations
from bmtpt_ds.stage_inputs import adaptation_runs, check_measured_method, source_tasks, target_tasks
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import Task


class TypicalRows:
    """In place of a tokenizer and rows: row i of a task is as long as such a row is, of tokens without a meaning."""

    pad_id = 0

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def splits(self) -> Splits:
        return Splits(list(range(typical_rows.ROWS)), [], [])

    def encode(self, task: Task, row: int) -> TokenRow:
        source, target = typical_rows.draw_row(self._recipe, task, row)
        return TokenRow([3 + (row + i) % 30_000 for i in range(source)], [3 + i for i in range(target)])

    def max_source_length(self, task: Task) -> int:
        return typical_rows.longest_row(self._recipe, [task]).source

    def max_target_length(self, task: Task) -> int:
        return typical_rows.longest_row(self._recipe, [task]).target


@dataclass(frozen=True)
class Bench:
    """A loaded model with the rows of its tasks."""

    session: Session
    sources: Sequence[TaskSplits]  # none: the source stage is not wanted
    runs: Sequence[TargetRun]  # likewise of the target stage


def tasks_to_profile(recipe: Recipe, stages: Sequence[str]) -> tuple[list[Task], dict[str, Recipe]]:
    """The source stage's tasks; the target stage's runs by name, the first task's where a recipe names several that
    are not adapted to together.

    Raises:
        UserError: a stage without a task, and its like.
    """
    check_measured_method(recipe)
    sources = source_tasks(recipe) if "source" in stages else []
    if "target" not in stages:
        return sources, {}
    target = recipe.target
    if len(target.tasks) > 1 and not target.multi and target.seeds is None:
        recipe = recipe.model_copy(update={"target": target.model_copy(update={"tasks": target.tasks[:1]})})
    return sources, adaptation_runs(recipe)


def open_bench(
    ranks: Ranks, recipe: Recipe, ds: dict, stop: StopSignal, stages: Sequence[str], *, random: bool
) -> Bench:
    """Loads the recipe's model and rows; `random`: its name's sizes, its tasks' lengths.

    Raises:
        UserError: as the stages themselves.
    """
    sources, recipes = tasks_to_profile(recipe, stages)
    targets = list({task.name: task for own in recipes.values() for task in target_tasks(own)}.values())
    tasks = list({task.name: task for task in [*sources, *targets]}.values())
    source = recipe.source.particles * recipe.source.kappa * recipe.source.rows_per_task
    cells = max(source if sources else 0, recipe.target.batch_size * len(recipes))
    if random:
        model = random_backbone(ranks, recipe.model, ds, cells)
        session = Session(recipe, model, TypicalRows(recipe), stop)
        settled = settle_activations(recipe.model, model, cells, session.longest(tasks), recipe.run)
        session = replace(session, activations=settled)
        splits = {task.name: session.encoder.splits() for task in tasks}
    else:
        splits = dict(zip((task.name for task in tasks), load_rows(ranks, recipe, tasks), strict=True))
        session = open_session(recipe, ranks, ds, cells, stop, tasks)
    runs = [target_run(name, own, splits) for name, own in recipes.items()]
    return Bench(session, [TaskSplits(task, splits[task.name]) for task in sources], runs)
