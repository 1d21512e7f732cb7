"""Whole runs of the stages: everything around a method and the loops of `source.py` and `target.py`.

A run first checks all that can be checked, in the order of cost (recipe, DeepSpeed JSON, directory, rows, model), and
only then makes its directory: a mistake leaves nothing behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bmtpt_ds.adaptation.reports import score_runs
from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.checkpoint import GO_ON, Stored
from bmtpt_ds.config import Recipe
from bmtpt_ds.config.methods import TUNES_WEIGHTS
from bmtpt_ds.data.splits import Splits, TaskSplits
from bmtpt_ds.evaluate import EncodedRows, TaskScore
from bmtpt_ds.methods import method
from bmtpt_ds.methods.job import AdaptJob, SourceJob, train
from bmtpt_ds.methods.stage_run import nothing_to_do, say_cut_rows
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.prompt_files import check_belongs, read_particles, write_particles, write_prompt
from bmtpt_ds.quiet import say
from bmtpt_ds.results import score_table, table_of_runs, write_results, write_results_of_runs
from bmtpt_ds.run_directory import RunDirectory
from bmtpt_ds.run_files import PARTICLES, RESULTS
from bmtpt_ds.session import Session, at_work, load_rows, open_session, start
from bmtpt_ds.stage_inputs import (
    adaptation_runs,
    check_source_method,
    check_source_rows,
    check_target_method,
    particle_ranks,
    rows_of_source_step,
    source_is_taught,
    source_tasks,
    target_splits,
    target_tasks,
)
from bmtpt_ds.stopping import StopSignal


def run_source(recipe: Recipe, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool) -> None:
    """`bmtpt source`: learns from the source tasks, by the recipe's method, into `run_dir`.

    Raises:
        UserError: a mistake of the user's; nothing is left behind.
        Stopped: a signal came; a checkpoint is written.
    """
    check_source_method(recipe)
    tasks = source_tasks(recipe)
    ds, ranks = start(recipe, json_name)
    directory = RunDirectory(run_dir, recipe, {"stage": "source"}, resume=resume, overwrite=overwrite)
    if nothing_to_do(ranks, directory, ds, json_name):
        return
    particle_ranks(recipe.source, ranks.world)  # refuses an impossible grid
    with at_work(ranks, GO_ON) as stop:
        splits = load_rows(ranks, recipe, tasks)
        sources = [TaskSplits(*pair) for pair in zip(tasks, splits, strict=True)]
        for task, rows in sources:
            check_source_rows(recipe, task, rows.train)
        rows, taught = rows_of_source_step(recipe), source_is_taught(recipe)
        session = open_session(recipe, ranks, ds, rows, stop, tasks, taught=taught)
        for task in tasks:
            session.encoder.check_answers(task)
        learned = method(recipe.method).learn(SourceJob(session, sources, directory))
        if ranks.first:
            processed = {"source": learned.rows, "target": 0}
            write_particles(run_dir, session, learned.tensors, recipe.source.tasks, processed)
            write_results(run_dir / RESULTS, session, processed, learned.parameters)
        say_cut_rows(session)
        say(f"source: {recipe.source.steps} steps done, {learned.says} in {run_dir / PARTICLES}")


@dataclass(frozen=True)
class _Target:
    """What all runs of one `adapt` have in common."""

    recipe: Recipe
    ranks: Ranks
    ds: dict
    splits: Mapping[str, Splits]  # by task
    stored: Stored | None  # what `--particles` names
    stop: StopSignal

    def session(self, runs: Sequence[TargetRun]) -> Session:
        tasks, rows = target_tasks(self.recipe), sum(run.batch_size for run in runs)
        session = open_session(self.recipe, self.ranks, self.ds, rows, self.stop, tasks)
        for task in tasks:
            session.encoder.check_answers(task)
        if self.stored is not None:
            check_belongs(self.stored, session)
        return session


def run_adapt(
    recipe: Recipe, particles: str, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool
) -> None:
    """`bmtpt adapt`: adapts to the target tasks, by the recipe's method, picks by validation, tests once.

    With `target.seeds` several runs side by side, each with a directory of its own below `run_dir`; one after another
    where a method tunes weights, which prompts can share and weights cannot.

    Args:
        particles: a run's directory or file, or `none` to start from vocabulary rows without a prior.

    Raises:
        UserError, Stopped: as `run_source`.
    """
    check_target_method(recipe, particles)
    recipes = adaptation_runs(recipe)
    tasks = target_tasks(recipe)
    ds, ranks = start(recipe, json_name)
    about = {"stage": "adapt", "particles": particles}
    directory = RunDirectory(run_dir, recipe, about, resume=resume, overwrite=overwrite)
    if nothing_to_do(ranks, directory, ds, json_name):
        return
    with at_work(ranks, GO_ON) as stop:
        splits = dict(zip((task.name for task in tasks), load_rows(ranks, recipe, tasks), strict=True))
        runs = [target_run(name, own, splits) for name, own in recipes.items()]
        stored = None
        if particles != "none":
            stored = ranks.from_first(ranks.first_does(lambda: read_particles(particles, recipe.method)))
        target = _Target(recipe, ranks, ds, splits, stored, stop)
        train_runs = _one_after_another if recipe.method in TUNES_WEIGHTS and len(runs) > 1 else _together
        tested = train_runs(target, runs, directory)
        names = [run.name for run in runs if run.name]
        if ranks.first and names:
            files = [directory.of_run(run.name, run.recipe).path / RESULTS for run in runs]
            write_results_of_runs(run_dir / RESULTS, recipe, files)
        say(table_of_runs(tested, "test") if names else score_table(tested[0], "test"))


def target_run(name: str, recipe: Recipe, splits: Mapping[str, Splits]) -> TargetRun:
    """A run's tasks with the rows that it trains on, which its seed picks."""
    tasks = target_tasks(recipe)
    return TargetRun(name, recipe, [TaskSplits(t, target_splits(recipe, t, splits[t.name])) for t in tasks])


def _together(target: _Target, runs: Sequence[TargetRun], directory: RunDirectory) -> list[dict[str, TaskScore]]:
    """Trains the runs side by side, writes what each leaves; the test scores of each, by task."""
    session = target.session(runs)
    begun = method(target.recipe.method).begin(AdaptJob(session, runs, directory, target.stored))
    places = {run.name: directory.of_run(run.name, run.recipe) for run in runs}
    adaptation = train(session, directory, runs, begun, target.recipe.target, places)
    tasks = {task.name: task for run in runs for task, _ in run.tasks}
    test_rows = {name: EncodedRows.of(session.encoder, task, target.splits[name].test) for name, task in tasks.items()}
    scored = score_runs(session, runs, adaptation.best, test_rows)
    tested = [{name: s.score for name, s in of_run.items()} for of_run in scored]
    if session.ranks.first:
        source = target.stored.state["rows_processed"]["source"] if target.stored else 0
        for r, run in enumerate(runs):
            processed = {"source": source, "target": begun.rows + run.recipe.target.steps * run.batch_size}
            own = replace(session, recipe=run.recipe)
            _write_run(places[run.name].path, own, run, adaptation, r, processed, tested[r])
    say_cut_rows(session)
    return tested


def _one_after_another(
    target: _Target, runs: Sequence[TargetRun], directory: RunDirectory
) -> list[dict[str, TaskScore]]:
    """As `_together`, each run from the model as it is on disk; those that are finished are left alone."""
    target.ranks.first_does(directory.open)
    tested = []
    for run in runs:
        own = directory.of_run(run.name, run.recipe)
        finished = target.ranks.from_first(own.results() if own.finished else None)
        if finished is None:
            tested += _together(target, [replace(run, name="")], own)
        else:
            tested.append({name: TaskScore(**score) for name, score in finished["tasks"].items()})
    return tested


def _write_run(
    folder: Path,
    session: Session,
    run: TargetRun,
    adaptation: Adaptation,
    number: int,
    processed: dict[str, int],
    scores: dict[str, TaskScore],
) -> None:
    """What a run leaves; `session` has its recipe."""
    best, shots = adaptation.best, run.recipe.target.shots
    write_prompt(folder, session, best.stored(number, list(scores)), list(scores), processed, best.parameters())
    write_results(folder / RESULTS, session, processed, best.parameters(), shots=shots, split="test", scores=scores)
