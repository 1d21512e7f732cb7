"""A grid from beginning to end."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from bmtpt_ds.config.scale import load_scale
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.launching import Place
from bmtpt_ds.experiments.reporting.report import run_report
from bmtpt_ds.experiments.scaling.jobs import Job, jobs_of, members_of
from bmtpt_ds.experiments.scaling.schedule import places, run_all
from bmtpt_ds.experiments.scaling.table import table
from bmtpt_ds.files import check_writable
from bmtpt_ds.quiet import say
from bmtpt_ds.stopping import StopSignal

REPORT = "report"  # the folder of `bmtpt report`'s files, in that of the runs


def run_scale(
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    layout: str | None,
    *,
    ranks: int | None = None,
    side_by_side: int = 1,
    hostfile: Path | None = None,
    dry_run: bool = False,
) -> str:
    """`bmtpt scale`: runs what is not finished of a recipe's grid into `out`.

    Args:
        overrides: as `--set` takes them; those of `scale.` keys change the grid.
        layout: the DeepSpeed JSON of members that name none.
        ranks: of a job.
        side_by_side: jobs at a time.
        dry_run: only say what would be run.

    Returns:
        the commands of a dry run, else a table of what is finished, which `report` in `out` goes into.

    Raises:
        UserError: a mistake in the recipe or the grid; runs of another recipe in `out`; members that failed, after all
            others have ended.
        Stopped: a signal came; the runs have written checkpoints.
    """
    own = [text for text in overrides if text.startswith("scale.")]
    shared = [text for text in overrides if not text.startswith("scale.")]
    scale = load_scale(recipe, own)
    jobs = jobs_of(recipe, members_of(recipe, shared, scale, layout), out, zero_shot=scale.zero_shot)
    check_writable(out, "--out")
    for job in jobs:
        job.check()
    where = places(ranks, side_by_side, hostfile)
    if dry_run:
        return "\n".join(_shown(job, where[0]) for job in jobs)
    say(f"{len(jobs)} runs into {out}, {len(where)} at a time; what each prints goes to a .log beside it")
    with StopSignal() as stop:
        failed = run_all(jobs, where, stop)
    text = table(jobs)
    if any(job.finished for job in jobs if job.stage == "adapt"):
        run_report([out], out / REPORT)
        text += f"\ntables by task, differences, pictures: {out / REPORT}"
    if failed:
        say(text)
        first = next(iter(failed))
        rest = f" (first: {first}: {failed[first]})"
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed or were left out{rest}; mend and start it again")
    return text


def _shown(job: Job, place: Place) -> str:
    state = "finished" if job.finished else "goes on" if job.outcome.parent.exists() else "to do"
    launched = "bmtpt" if place.ranks == 1 and place.hostfile is None else "deepspeed ... --module -- bmtpt_ds"
    return f"{state:8}  {job}\n          {launched} {shlex.join(job.arguments)}"
