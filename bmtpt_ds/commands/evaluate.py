"""`bmtpt evaluate`: the scores of a finished run on a split."""

import json
from collections.abc import Sequence
from pathlib import Path

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.tokens import RowEncoder
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import EncodedRows, Scored, score_prompts
from bmtpt_ds.files import check_files, write_atomically
from bmtpt_ds.methods import reader
from bmtpt_ds.prompt_files import check_answers, check_belongs, read_run
from bmtpt_ds.quiet import say
from bmtpt_ds.results import score_table, write_results
from bmtpt_ds.session import at_work, load_rows, open_session, start
from bmtpt_ds.tasks import get_task


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
    ds, ranks = start(recipe, json_name)
    ranks.first_does(lambda: check_files({"--json": json_file, "--predictions": predictions_file}))
    stored = ranks.from_first(ranks.first_does(lambda: read_run(prompt_dir, trained)))
    for task in tasks:
        check_answers(stored, task.name)
    scored: dict[str, Scored] = {}
    with at_work(ranks) as stop:
        splits = load_rows(ranks, recipe, tasks)
        session = open_session(recipe, ranks, ds, recipe.evaluate.batch_size * ranks.world, stop)
        for task in tasks:
            session.encoder.check_answers(task)
        check_belongs(stored, session)
        say(session.describe())
        prompt_of = reader(stored, session)
        for task, rows in zip(tasks, splits, strict=True):
            chosen = EncodedRows.of(session.encoder, task, getattr(rows, split))
            (scored[task.name],) = score_prompts(session, [(prompt_of(task.name), chosen)])
    if not ranks.first:
        return ""
    scores = {name: s.score for name, s in scored.items()}
    table = score_table(scores, split)
    try:
        if json_file:
            tensors = stored.tensors.values()  # of a run of before it was written
            parameters = stored.state.get("trainable_parameters", sum(t.numel() for t in tensors))
            processed = stored.state["rows_processed"]
            shots = _shots(recipe, trained, names)
            write_results(json_file, session, processed, parameters, shots=shots, split=split, scores=scores)
        if predictions_file:
            _write_predictions(predictions_file, session.encoder, scored)
    except UserError:
        say(table)  # it may have taken hours
        raise
    return table


def _shots(recipe: Recipe, trained: str, names: Sequence[str]) -> int | None:
    """Labelled rows of a task that the prompt was trained on: 0 of tasks that its source stage has not seen, None for
    all rows. Where no source task is known (an imported prompt) the tasks may have been among them."""
    if trained == "adapt":
        return recipe.target.shots
    seen = set(recipe.source.tasks)
    return 0 if seen and seen.isdisjoint(names) else None


def _write_predictions(file: Path, encoder: RowEncoder, scored: dict[str, Scored]) -> None:
    lines = [json.dumps({"task": name, **p}) for name, s in scored.items() for p in s.predictions(encoder)]
    write_atomically(file, ("\n".join(lines) + "\n").encode())
