"""Whole runs of the three commands: everything around the loops of `source.py` and `target.py`.

A run first checks all that can be checked, in the order of cost (recipe, DeepSpeed JSON, directory, rows, model), and
only then makes its directory: a mistake leaves nothing behind.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from bmtpt_ds.checkpoint import GO_ON, Stored, write_atomically
from bmtpt_ds.config import Recipe
from bmtpt_ds.data.splits import TaskSplits
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import Scored, score_rows
from bmtpt_ds.parallel import Ranks, particle_ranks
from bmtpt_ds.prompt_files import check_belongs, prompt_for, read_particles, read_run, write_particles, write_prompt
from bmtpt_ds.quiet import say
from bmtpt_ds.results import score_table, write_results
from bmtpt_ds.run_directory import PARTICLES, RESULTS, RunDirectory, check_files
from bmtpt_ds.runlog import RunLog, check_monitors
from bmtpt_ds.session import Session, at_work, load_rows, open_session, start
from bmtpt_ds.source import Posterior, learn_posterior, svgd_backend
from bmtpt_ds.stage_inputs import check_source_rows, source_tasks, target_splits, tasks_of_adaptation
from bmtpt_ds.target import Adaptation, Prior, adapt, batch_size_of
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
    if _nothing_to_do(ranks, directory, ds, json_name):
        return
    particle_ranks(source.particle_ranks, source.particles, ranks.world)  # refuses an impossible grid
    with at_work(ranks, GO_ON) as stop:
        splits = load_rows(ranks, recipe, tasks)
        sources = [TaskSplits(*pair) for pair in zip(tasks, splits, strict=True)]
        for task, rows in sources:
            check_source_rows(recipe, task, rows.train)
        cells = source.particles * source.kappa * source.rows_per_task
        session = open_session(recipe, ranks, ds, cells, stop)
        for task in tasks:
            session.encoder.check_answers(task)
        posterior = Posterior.start(session.initial_prompts(source.particles), source.optimizer)
        ranks.together(lambda: svgd_backend(source, posterior.particles))  # before anything is written
        _restore(session, directory, posterior)
        ranks.first_does(directory.open)
        log = _open_log(session, directory, posterior, source.steps, sources)
        learn_posterior(session, sources, posterior, log, directory.checkpoints)
        log.close()
        if ranks.first:
            processed = {"source": source.steps * cells, "target": 0}
            write_particles(run_dir, session, posterior.particles, source.tasks, processed)
            write_results(run_dir / RESULTS, session, processed, posterior.particles.numel())
        _say_cut_rows(log, session)
        log.say(f"source: {source.steps} steps done, {posterior.describe()} in {run_dir / PARTICLES}")


def run_adapt(
    recipe: Recipe, particles: str, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool
) -> None:
    """`bmtpt adapt`: adapts the centre of the particles to the target tasks, picks by validation, tests once.

    Args:
        particles: a run's directory or file, or `none` to start from vocabulary rows without a prior.

    Raises:
        UserError, Stopped: as `run_source`.
    """
    target = recipe.target
    tasks = tasks_of_adaptation(recipe)
    ds, ranks = start(recipe, json_name)
    about = {"stage": "adapt", "particles": particles}
    directory = RunDirectory(run_dir, recipe, about, resume=resume, overwrite=overwrite)
    if _nothing_to_do(ranks, directory, ds, json_name):
        return
    with at_work(ranks, GO_ON) as stop:
        read = zip(tasks, load_rows(ranks, recipe, tasks), strict=True)
        targets = [TaskSplits(task, target_splits(recipe, task, splits)) for task, splits in read]
        stored = None if particles == "none" else ranks.from_first(ranks.first_does(lambda: read_particles(particles)))
        batch = batch_size_of(target, targets)
        session = open_session(recipe, ranks, ds, batch, stop)
        for task in tasks:
            session.encoder.check_answers(task)
        prior, rows_before = _prior(session, stored)
        adaptation = Adaptation(prior.centre, len(tasks), target)
        _restore(session, directory, adaptation)
        ranks.first_does(directory.open)
        log = _open_log(session, directory, adaptation, target.steps, targets)
        adapt(session, targets, prior, adaptation, log, directory.checkpoints)
        best = adaptation.best.compose().detach()
        tested = {
            task.name: score_rows(session, prompt, task, splits.test).score
            for (task, splits), prompt in zip(targets, best, strict=True)
        }
        log.close()
        if ranks.first:
            processed = {"source": rows_before, "target": target.steps * batch}
            write_prompt(run_dir, session, adaptation.best, list(tested), processed)
            parameters = sum(t.numel() for t in adaptation.best.tensors())
            write_results(
                run_dir / RESULTS, session, processed, parameters, shots=target.shots, split="test", scores=tested
            )
        _say_cut_rows(log, session)
        log.say(score_table(tested, "test"))


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
            scored[task.name] = score_rows(session, prompt, task, getattr(rows, split))
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
            _write_predictions(predictions_file, scored)
    except UserError:
        say(table)  # it may have taken hours
        raise
    return table


def _write_predictions(file: Path, scored: dict[str, Scored]) -> None:
    lines = [json.dumps({"task": name, **p}) for name, s in scored.items() for p in s.predictions]
    write_atomically(file, ("\n".join(lines) + "\n").encode())


def _nothing_to_do(ranks: Ranks, directory: RunDirectory, ds: dict, json_name: str | None) -> bool:
    """Refuses a directory or a monitor that cannot be written; True if the run to be resumed is finished."""
    ranks.first_does(directory.check)
    ranks.first_does(lambda: check_monitors(ds, str(json_name)))
    finished = ranks.from_first(directory.finished)
    if finished:
        say(f"{directory.path}: finished already")
    return finished


def _prior(session: Session, stored: Stored | None) -> tuple[Prior, int]:
    """The prior of the target prompt, and the rows that its source stage processed."""
    target = session.recipe.target
    if stored is None:
        return Prior("none", session.initial_prompts(1), target.sigma), 0
    check_belongs(stored, session)
    particles = stored.tensors["particles"].to(session.ranks.device)
    return Prior(target.prior, particles, target.sigma), stored.state["rows_processed"]["source"]


def _restore(session: Session, directory: RunDirectory, state: Posterior | Adaptation) -> None:
    """Puts `state` where the newest sound checkpoint stands, on all ranks; leaves it where there is none."""
    found = session.ranks.first_does(directory.checkpoint_to_resume)
    stored: Stored | None = session.ranks.from_first(found)
    if stored is not None:
        check_belongs(stored, session)
        state.restore(stored.tensors, stored.state)


def _say_cut_rows(log: RunLog, session: Session) -> None:
    if cut := session.encoder.cut_rows():
        log.say(cut)


def _open_log(
    session: Session, directory: RunDirectory, state: Posterior | Adaptation, steps: int, tasks: Sequence[TaskSplits]
) -> RunLog:
    """The run's log, which first says what is run, with what and where."""
    log = RunLog(
        directory.path,
        session.model.ds,
        ranks=session.ranks,
        start=state.step,
        validated=state.validated,
        steps=steps,
        title=directory.stage,
    )
    again = f", on from step {state.step}" if state.step else ""
    log.say(f"{directory.stage} into {directory.path}: {steps} steps{again}, {state.describe()}")
    counts = [f"{task.name} {' + '.join(f'{len(rows):,}' for rows in splits)}" for task, splits in tasks]
    log.say(f"rows (train + validation + test): {', '.join(counts)}")
    log.say(session.describe())
    return log
