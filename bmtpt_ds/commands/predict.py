"""`bmtpt predict`: answers to texts of one's own through the prompts of finished runs, one backbone for all."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bmtpt_ds.answers import PromptedTask, Question, Scoring, answer
from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.commands.text_lines import read_lines, write_answers
from bmtpt_ds.config import Recipe, override_recipe
from bmtpt_ds.config.methods import TUNES_WEIGHTS
from bmtpt_ds.data.tokens import RowEncoder
from bmtpt_ds.errors import UserError
from bmtpt_ds.methods import reader
from bmtpt_ds.progress import Pass
from bmtpt_ds.prompt_files import check_answers, check_belongs, check_one_model, read_run
from bmtpt_ds.run_files import read_run_recipe
from bmtpt_ds.session import Session, at_work, open_session, start
from bmtpt_ds.tasks import Task, get_task
from bmtpt_ds.tasks.targets import NO_LABEL, LabelTarget

_ROUNDS = 8  # batches of every rank between two writes: answers come as they are found, and batches stay alike


class Run(NamedTuple):
    """A finished run whose prompt answers."""

    folder: Path
    stage: str  # `source` or `adapt`
    recipe: Recipe  # its own, with overrides

    @property
    def tasks(self) -> list[str]:
        return self.recipe.target.tasks if self.stage == "adapt" else self.recipe.source.tasks


class Asked(NamedTuple):
    """A task to answer, and the run whose prompt does."""

    task: Task
    run: Run

    @property
    def scoring(self) -> Scoring:
        return self.run.recipe.evaluate.scoring


def run_predict(
    folders: Sequence[Path], names: Sequence[str], overrides: list[str], json_name: str | None, out: BinaryIO
) -> None:
    """Answers every line of stdin on `out`, in order.

    A line is a text, which every task answers (tabs between the answers), or a JSON object with a task's columns; one
    that has `task` besides is answered by that task alone.

    Args:
        folders: runs of `adapt`, each with its task's prompt, or of `source`, whose particles' mean answers any other.
        names: the tasks, in the order of their answers; default: those of the runs of `adapt`.
        overrides: `key=value` texts, put above each run's own recipe. The first run's says what of a recipe concerns
            the whole job: model, batch size, timeout.

    Raises:
        UserError: a mistake in runs, tasks or lines, found before the model is loaded.
        Stopped: a signal came.
    """
    runs = [_read_run(folder, overrides) for folder in folders]
    asked = _asked(runs, names)
    first = runs[0].recipe
    ds, ranks = start(first, json_name)
    stored = ranks.from_first(ranks.first_does(lambda: _read_prompts(runs)))
    for task, run in asked:
        check_answers(stored[runs.index(run)], task.name)
    lines = ranks.from_first(ranks.first_does(lambda: _read_sources(asked)))
    with at_work(ranks) as stop:
        session = open_session(first, ranks, ds, first.evaluate.batch_size * ranks.world, stop)
        prompted = _prompted(session, runs, stored, asked)
        window = _ROUNDS * first.evaluate.batch_size * ranks.world
        with Pass("answering texts", sum(map(len, lines)), shown=ranks.first) as progress:
            for begin in range(0, len(lines), window):
                answered = _answer_lines(session, lines[begin : begin + window], asked, prompted, progress)
                with progress.aside():
                    ranks.first_does(lambda answered=answered: write_answers(out, answered))


# --- runs and tasks --------------------------------------------------------------------------------------------------


def _read_run(folder: Path, overrides: list[str]) -> Run:
    stage, values = read_run_recipe(folder)
    return Run(folder, stage, override_recipe(values, overrides, str(folder)))


def _asked(runs: Sequence[Run], names: Sequence[str]) -> list[Asked]:
    """The tasks in the order of their answers, each with the one run that answers it."""
    names = list(names) or [name for run in runs for name in _default_tasks(run)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is to be answered twice: give each task once, and each task's prompt once")
    return [_asked_of(runs, name) for name in names]


def _default_tasks(run: Run) -> list[str]:
    if run.stage == "source" and len(run.tasks) != 1:
        raise UserError(
            f"--prompt {run.folder}: a run of `bmtpt source`, whose prompt is of no single task: say with --task how "
            f"a text is to be read (its own tasks: {', '.join(run.tasks) or 'not known'})"
        )
    return run.tasks


def _asked_of(runs: Sequence[Run], name: str) -> Asked:
    owners = [run for run in runs if run.stage == "adapt" and name in run.tasks]
    owners = owners or [run for run in runs if run.stage == "source"]
    task = get_task(name, (owners or runs)[0].recipe.data.tasks)
    if not owners:
        theirs = ", ".join(f"{run.folder} is for {', '.join(run.tasks)}" for run in runs)
        raise UserError(f"--task {name}: no prompt is given for it ({theirs})")
    if len(owners) > 1:
        both = " and ".join(str(run.folder) for run in owners[:2])
        raise UserError(f"--task {name}: both {both} would answer it; give one of them")
    task.check_scoring(owners[0].recipe.evaluate.scoring)
    return Asked(task, owners[0])


def _read_prompts(runs: Sequence[Run]) -> list[Stored]:
    stored = [read_run(run.folder, run.stage) for run in runs]
    check_one_model(stored)
    tuned = next((run for run in runs if run.stage == "adapt" and run.recipe.method in TUNES_WEIGHTS), None)
    if tuned and len(runs) > 1:
        raise UserError(f"--prompt {tuned.folder}: method {tuned.recipe.method} has tuned weights; give that run alone")
    return stored


def _prompted(
    session: Session,
    runs: Sequence[Run],
    stored: Sequence[Stored],
    asked: Sequence[Asked],
) -> list[PromptedTask]:
    """Each task with its prompt and its run's way of writing rows."""
    encoders, readers = [], []
    for run, of_run in zip(runs, stored, strict=True):
        own = replace(session, recipe=run.recipe)
        check_belongs(of_run, own)
        encoders.append(RowEncoder(session.encoder.tokenizer, run.recipe.model, run.recipe.data))
        readers.append(reader(of_run, own))
    numbers = [runs.index(run) for _, run in asked]
    return [PromptedTask(task, readers[i](task.name), encoders[i]) for (task, _), i in zip(asked, numbers, strict=True)]


# --- lines -----------------------------------------------------------------------------------------------------------

Source = tuple[int, str | dict[str, Any]]  # which of the asked tasks, and the text or the row that it reads


def _read_sources(asked: Sequence[Asked]) -> list[list[Source]]:
    return [_sources(line, number, asked) for number, line in enumerate(read_lines(), start=1)]


def _sources(line: str | dict[str, Any], number: int, asked: Sequence[Asked]) -> list[Source]:
    """What each task that is to answer a line reads.

    Raises:
        UserError: an unknown task, columns that are not a task's; names the line.
    """
    everyone = range(len(asked))
    if isinstance(line, str):
        return [(i, _source_of_text(line, asked[i], f"line {number}")) for i in everyone]
    # "task" may be a column too
    columns = {column for one in asked for column in one.task.source_columns}
    name = line.get("task") if "task" not in columns else None
    chosen = [i for i in everyone if name is None or asked[i].task.name == name]
    if not chosen:
        there = ", ".join(one.task.name for one in asked)
        raise UserError(f"line {number}: task {name!r} is not asked here (there: {there}); add it to --task")
    return [(i, _checked(line, asked[i], f"line {number}")) for i in chosen]


def _source_of_text(text: str, asked: Asked, place: str) -> str | dict[str, Any]:
    """A task of one column reads the text in it; for others the text is all that the encoder reads."""
    columns = asked.task.source_columns
    if len(columns) > 1:
        return text
    return _checked({columns[0]: text}, asked, place)


def _checked(row: dict[str, Any], asked: Asked, place: str) -> dict[str, Any]:
    """A row that the task can read."""
    problem = asked.task.source_problem(row) or asked.task.refusal(row)
    if problem:
        raise UserError(f"{place}: {problem}")
    return row


# --- answers ---------------------------------------------------------------------------------------------------------


def _answer_lines(
    session: Session,
    lines: Sequence[list[Source]],
    asked: Sequence[Asked],
    prompted: Sequence[PromptedTask],
    progress: Pass,
) -> list[list[str]]:
    """The answers to each line; all ranks take part."""
    wanted = [source for line in lines for source in line]
    found = [""] * len(wanted)
    for scoring in sorted({asked[i].scoring for i, _ in wanted}):
        chosen = [k for k, (i, _) in enumerate(wanted) if asked[i].scoring == scoring]
        questions = [_question(prompted[wanted[k][0]], wanted[k][1]) for k in chosen]
        for k, text in zip(chosen, answer(session, questions, scoring, progress), strict=True):
            found[k] = _readable(prompted[wanted[k][0]], text)
    left = iter(found)
    return [[next(left) for _ in line] for line in lines]


def _question(prompted: PromptedTask, source: str | dict[str, Any]) -> Question:
    if isinstance(source, dict):
        return Question(prompted, prompted.encoder.encode_source(prompted.task, source))
    return Question(prompted, prompted.encoder.encode_text(prompted.task, source))


def _readable(prompted: PromptedTask, text: str) -> str:
    """A label by its word; what is no label as it was generated."""
    target = prompted.task.target
    if not isinstance(target, LabelTarget):
        return text
    number = target.read(text, prompted.encoder.labels)
    return text if number == NO_LABEL else target.words[number]
