"""What a run of either stage does before and after its loop: its directory, where it stands, its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.data.splits import TaskSplits
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.prompt_files import check_belongs
from bmtpt_ds.quiet import say
from bmtpt_ds.run_directory import RunDirectory
from bmtpt_ds.runlog import RunLog
from bmtpt_ds.session import Session
from bmtpt_ds.source import Posterior
from bmtpt_ds.stage_inputs import check_monitors


def nothing_to_do(ranks: Ranks, directory: RunDirectory, ds: dict, json_name: str | None) -> bool:
    """Refuses a directory or a monitor that cannot be written; True if the run to be resumed is finished."""
    ranks.first_does(directory.check)
    ranks.first_does(lambda: check_monitors(ds, str(json_name)))
    finished = ranks.from_first(directory.finished)
    if finished:
        say(f"{directory.path}: finished already")
    return finished


def restore(session: Session, directory: RunDirectory, state: Posterior | Adaptation) -> None:
    """Puts `state` where the newest sound checkpoint stands, on all ranks; leaves it where there is none."""
    found = session.ranks.first_does(directory.checkpoint_to_resume)
    stored: Stored | None = session.ranks.from_first(found)
    if stored is not None:
        check_belongs(stored, session)
        state.restore(stored.tensors, stored.state)


def say_cut_rows(session: Session) -> None:
    if cut := session.encoder.cut_rows():
        say(cut)


def open_log(
    session: Session,
    directory: RunDirectory,
    state: Posterior | Adaptation,
    steps: int,
    tasks: Sequence[TaskSplits],
    runs: Mapping[str, Path] | None = None,
) -> RunLog:
    """The log, which first says what is run, with what and where.

    Args:
        tasks: with the rows that a run reads.
        runs: the directories of runs side by side, by name.
    """
    log = RunLog(
        directory.path,
        session.model.ds,
        ranks=session.ranks,
        start=state.step,
        validated=state.validated,
        steps=steps,
        title=directory.stage,
        runs=runs,
    )
    again = f", on from step {state.step}" if state.step else ""
    log.say(f"{directory.stage} into {directory.path}: {steps} steps{again}, {state.describe()}")
    if runs:
        log.say(f"runs: {', '.join(runs)}")
    counts = [f"{task.name} {' + '.join(f'{len(rows):,}' for rows in splits)}" for task, splits in tasks]
    log.say(f"rows (train + validation + test): {', '.join(counts)}")
    log.say(session.describe())
    log.say(session.activations)
    return log
