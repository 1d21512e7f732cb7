"""Whole runs of the three commands: everything around the loops of `source.py` and `target.py`.

A run first checks all that can be checked, in the order of cost (recipe, DeepSpeed JSON, directory, rows, model), and
only then makes its directory: a mistake leaves nothing behind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bmtpt_ds.adaptation.reports import score_runs
from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.checkpoint import GO_ON, Stored
from bmtpt_ds.commands.stage_run import nothing_to_do, open_log, restore, say_cut_rows
from bmtpt_ds.config import Recipe
from bmtpt_ds.data.splits import Splits, TaskSplits
from bmtpt_ds.data.tokens import RowEncoder
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import EncodedRows, Scored, TaskScore, score_prompts
from bmtpt_ds.files import check_files, write_atomically
from bmtpt_ds.parallel import particle_ranks
from bmtpt_ds.prompt_files import check_belongs, prompt_for, read_particles, read_run, write_particles, write_prompt
from bmtpt_ds.quiet import say
from bmtpt_ds.results import score_table, table_of_runs, write_results, write_results_of_runs
from bmtpt_ds.run_directory import RunDirectory
from bmtpt_ds.run_files import PARTICLES, RESULTS
from bmtpt_ds.session import Session, at_work, load_rows, open_session, start
from bmtpt_ds.source import Posterior, learn_posterior, svgd_backend
from bmtpt_ds.stage_inputs import adaptation_runs, check_source_rows, source_tasks, target_splits, target_tasks
from bmtpt_ds.target import Prior, adapt
from bmtpt_ds.tasks import get_task


def run_source(recipe: Recipe, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool) -> None:
    """`bmtpt source`: learns the posterior of the source tasks into `run_dir`.

    Raises:
        UserError: a mistake of the user's; nothing is left behind.
        Stopped: a signal came; a checkpoint is written.
    """
    source = recipe.source
    tasks = source_tasks(recipe)
    ds, ranks = start(recipe, json_name)
    directory = RunDirectory(run_dir, recipe, {"stage": "source"}, resume=resume, overwrite=overwrite)
    if nothing_to_do(ranks, directory, ds, json_name):
        return
    particle_ranks(source.particle_ranks, source.particles, ranks.world)  # refuses an impossible grid
    with at_work(ranks, GO_ON) as stop:
        splits = load_rows(ranks, recipe, tasks)
        sources = [TaskSplits(*pair) for pair in zip(tasks, splits, strict=True)]
        for task, rows in sources:
            check_source_rows(recipe, task, rows.train)
        cells = source.particles * source.kappa * source.rows_per_task
        session = open_session(recipe, ranks, ds, cells, stop, tasks)
        for task in tasks:
            session.encoder.check_answers(task)
        posterior = Posterior.start(session.initial_prompts(source.particles), source.optimizer)
        ranks.together(lambda: svgd_backend(source, posterior.particles))  # before anything is written
        restore(session, directory, posterior)
        ranks.first_does(directory.open)
        log = open_log(session, directory, posterior, source.steps, sources)
        learn_posterior(session, sources, posterior, log, directory.checkpoints)
        log.close()
        if ranks.first:
            processed = {"source": source.steps * cells, "target": 0}
            write_particles(run_dir, session, posterior.particles, source.tasks, processed)
            write_results(run_dir / RESULTS, session, processed, posterior.particles.numel())
        say_cut_rows(log, session)
        log.say(f"source: {source.steps} steps done, {posterior.describe()} in {run_dir / PARTICLES}")


def run_adapt(
    recipe: Recipe, particles: str, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool
) -> None:
    """`bmtpt adapt`: adapts the centre of the particles to the target tasks, picks by validation, tests once.

    With `target.seeds` several runs side by side, each with a directory of its own below `run_dir`.

    Args:
        particles: a run's directory or file, or `none` to start from vocabulary rows without a prior.

    Raises:
        UserError, Stopped: as `run_source`.
    """
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
        stored = None if particles == "none" else ranks.from_first(ranks.first_does(lambda: read_particles(particles)))
        session = open_session(recipe, ranks, ds, sum(run.batch_size for run in runs), stop, tasks)
        for task in tasks:
            session.encoder.check_answers(task)
        prior, rows_before = _prior(session, stored, runs)
        adaptation = Adaptation(prior.centre, len(runs[0].tasks), recipe.target)
        restore(session, directory, adaptation)
        directories = [directory.of_run(run.name, run.recipe) for run in runs]
        for each in dict.fromkeys([directory, *directories]):
            ranks.first_does(each.open)
        places = {run.name: own.path for run, own in zip(runs, directories, strict=True) if run.name}
        trained = [TaskSplits(task, target_splits(recipe, task, splits[task.name])) for task in tasks]
        log = open_log(session, directory, adaptation, recipe.target.steps, trained, places)
        adapt(session, runs, prior, adaptation, log, directory.checkpoints)
        test_rows = {task.name: EncodedRows.of(session.encoder, task, splits[task.name].test) for task in tasks}
        scored = score_runs(session, runs, adaptation.best.compose(), test_rows)
        log.close()
        tested = [{name: s.score for name, s in of_run.items()} for of_run in scored]
        if ranks.first:
            for r, (run, own) in enumerate(zip(runs, directories, strict=True)):
                _write_run(own.path, replace(session, recipe=run.recipe), run, adaptation, r, rows_before, tested[r])
            if places:
                write_results_of_runs(run_dir / RESULTS, session, [path / RESULTS for path in places.values()])
        say_cut_rows(log, session)
        log.say(table_of_runs(tested, "test") if places else score_table(tested[0], "test"))


def target_run(name: str, recipe: Recipe, splits: Mapping[str, Splits]) -> TargetRun:
    """A run's tasks with the rows that it trains on, which its seed picks."""
    tasks = target_tasks(recipe)
    return TargetRun(name, recipe, [TaskSplits(t, target_splits(recipe, t, splits[t.name])) for t in tasks])


def _prior(session: Session, stored: Stored | None, runs: Sequence[TargetRun]) -> tuple[Prior, int]:
    """The prior of the runs' prompts [R, M, L, H], and the rows that the source stage processed."""
    target = session.recipe.target
    if stored is None:
        begun = [replace(session, recipe=run.recipe).initial_prompts(1) for run in runs]
        return Prior("none", torch.stack(begun), target.sigma), 0
    check_belongs(stored, session)
    particles = stored.tensors["particles"].to(session.ranks.device)
    return Prior(target.prior, particles.expand(len(runs), *particles.shape), target.sigma), stored.state[
        "rows_processed"
    ]["source"]


def _write_run(
    folder: Path,
    session: Session,
    run: TargetRun,
    adaptation: Adaptation,
    number: int,
    rows_before: int,
    scores: dict[str, TaskScore],
) -> None:
    """What a run leaves; `session` has its recipe."""
    target, best = run.recipe.target, adaptation.best.of_run(number)
    processed = {"source": rows_before, "target": target.steps * run.batch_size}
    write_prompt(folder, session, best, list(scores), processed)
    parameters = sum(tensor.numel() for tensor in best.tensors())
    write_results(folder / RESULTS, session, processed, parameters, shots=target.shots, split="test", scores=scores)


def run_evaluate(
    prompt_dir: Path,
    recipe: Recipe,
    trained: str,
    task_names: Sequence[str],
    split: str,
    json_name: str | None,
    json_file: Path | None,
    predictions_file: Path | None,
) -> str:
    """`bmtpt evaluate`: scores a run's prompt on a split.

    Args:
        prompt_dir: a run of `adapt` (its prompt), or of `source` (the particles' mean, on any task: zero shots).
        recipe: the run's, with overrides.
        trained: the stage that the run is of, `source` or `adapt`.
        task_names: default: the tasks that the run was for.
        split: `validation` or `test`.

    Returns:
        a table for a person; "" on ranks other than 0.
    """
    own = recipe.target.tasks if trained == "adapt" else recipe.source.tasks
    names = list(task_names) or own
    if not names:
        raise UserError(f"{prompt_dir}: its prompt is of no task that is known; say with --task which to score")
    tasks = [get_task(name, recipe.data.tasks) for name in names]
    strange = [name for name in names if trained == "adapt" and name not in own]
    if strange:
        raise UserError(f"--task {strange[0]}: the prompt in {prompt_dir} is for {', '.join(own)}")
    for task in tasks:
        task.check_scoring(recipe.evaluate.scoring)
    check_files({"--json": json_file, "--predictions": predictions_file})
    ds, ranks = start(recipe, json_name)
    stored = ranks.from_first(ranks.first_does(lambda: read_run(prompt_dir, trained)))
    prompts = {task.name: prompt_for(stored, task.name) for task in tasks}
    scored: dict[str, Scored] = {}
    with at_work(ranks) as stop:
        splits = load_rows(ranks, recipe, tasks)
        session = open_session(recipe, ranks, ds, recipe.evaluate.batch_size * ranks.world, stop)
        for task in tasks:
            session.encoder.check_answers(task)
        check_belongs(stored, session)
        say(session.describe())
        for task, rows in zip(tasks, splits, strict=True):
            prompt = prompts[task.name].to(ranks.device)
            chosen = EncodedRows.of(session.encoder, task, getattr(rows, split))
            (scored[task.name],) = score_prompts(session, [(prompt, chosen)])
    if not ranks.first:
        return ""
    scores = {name: s.score for name, s in scored.items()}
    table = score_table(scores, split)
    try:
        if json_file:
            shots = recipe.target.shots if trained == "adapt" else None
            parameters = sum(t.numel() for t in stored.tensors.values())
            processed = stored.state["rows_processed"]
            write_results(json_file, session, processed, parameters, shots=shots, split=split, scores=scores)
        if predictions_file:
            _write_predictions(predictions_file, session.encoder, scored)
    except UserError:
        say(table)  # it may have taken hours
        raise
    return table


def _write_predictions(file: Path, encoder: RowEncoder, scored: dict[str, Scored]) -> None:
    lines = [json.dumps({"task": name, **p}) for name, s in scored.items() for p in s.predictions(encoder)]
    write_atomically(file, ("\n".join(lines) + "\n").encode())
