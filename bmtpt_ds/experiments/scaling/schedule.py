"""Runs jobs side by side as far as places and what they need allow; one that fails leaves the others running."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from bmtpt_ds.errors import UserError, written
from bmtpt_ds.experiments.launching import Place, started
from bmtpt_ds.experiments.scaling.jobs import Job
from bmtpt_ds.quiet import say
from bmtpt_ds.readable import duration
from bmtpt_ds.stopping import StopSignal

_POLL = 0.2  # seconds


def places(ranks: int | None, side_by_side: int, hostfile: Path | None) -> list[Place]:
    """Where so many jobs run at a time.

    Args:
        ranks: of a job; default: the GPUs there are, shared out, or one rank on a machine without.

    Raises:
        UserError: more ranks than GPUs; several jobs at a time on the nodes of a hostfile.
    """
    if hostfile is not None:
        if not hostfile.is_file():
            raise UserError(f"--hostfile {hostfile}: no such file")
        if side_by_side > 1 or ranks is not None:
            raise UserError("--hostfile: a job takes all of its nodes; leave out --jobs and --ranks")
        return [Place(hostfile=hostfile)]
    devices = visible_gpus()
    if not devices:
        cores = len(os.sched_getaffinity(0))
        threads = {"OMP_NUM_THREADS": str(max(1, cores // (side_by_side * (ranks or 1))))}
        variables = {} if side_by_side == 1 or "OMP_NUM_THREADS" in os.environ else threads
        return [Place(ranks or 1, variables=variables)] * side_by_side
    each = ranks or len(devices) // side_by_side
    if each < 1 or each * side_by_side > len(devices):
        raise UserError(f"--jobs {side_by_side} of {each or 1} ranks: there are {len(devices)} GPUs; ask for fewer")
    return [Place(each, devices=tuple(devices[i * each : (i + 1) * each])) for i in range(side_by_side)]


def visible_gpus() -> list[int]:
    """The numbers of this machine's NVIDIA GPUs that may be used; none where ranks are to run on CPUs."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    there = sum(line.startswith("GPU ") for line in listed.splitlines())
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return list(range(there))
    return [int(number) for number in asked.split(",") if number.strip().isdecimal()]


def run_all(jobs: Sequence[Job], where: Sequence[Place], stop: StopSignal) -> dict[Job, str]:
    """Runs the jobs that are not finished; a line for each when it is over.

    Returns:
        why, of each job that is not finished then.

    Raises:
        Stopped: a signal came; what was running has been told to stop.
    """
    failed: dict[Job, str] = {}
    waiting, free = [job for job in jobs if not job.finished], list(where)
    number = len(jobs) - len(waiting)
    if number:
        say(f"{number} of {len(jobs)} finished already")
    running: dict[Future[str], tuple[Job, Place, float]] = {}
    with ThreadPoolExecutor(len(where)) as pool:
        while (waiting or running) and stop.received is None:
            for job in [job for job in waiting if job.needs in failed]:
                waiting.remove(job)
                number += 1
                failed[job] = f"left out for want of {failed_first(job, failed)}"
                say(f"{number}/{len(jobs)}  {job}: {failed[job]}")
            for job in [job for job in waiting if job.needs is None or job.needs.finished][: len(free)]:
                waiting.remove(job)
                place = free.pop(0)
                running[pool.submit(_run, job, place, stop)] = job, place, time.monotonic()
            for future in wait(running, timeout=_POLL, return_when=FIRST_COMPLETED).done:
                job, place, began = running.pop(future)
                free.insert(0, place)
                number += 1
                why = future.result()
                if why:
                    failed[job] = why
                what = f"FAILED ({why}); see {job.log}" if why else "done"
                if stop.received is None:
                    say(f"{number}/{len(jobs)}  {job}: {what} ({duration(time.monotonic() - began)})")
    if stop.received is not None:
        say("stopped: start the same command again to go on")
        raise stop.stopped()
    return failed


def failed_first(job: Job, failed: dict[Job, str]) -> Job:
    """The job whose failure keeps this one from running."""
    while job.needs in failed:
        job = job.needs
    return job


def _run(job: Job, place: Place, stop: StopSignal) -> str:
    """Runs a job to its end, or until a signal comes; why it failed, "" if it did not."""
    try:
        with written(job.log):
            job.log.parent.mkdir(parents=True, exist_ok=True)
            log = job.log.open("a")
    except UserError as mistake:
        return str(mistake)
    with log, started(place, job.arguments, log) as process:
        while process.poll() is None and stop.received is None:
            time.sleep(_POLL)
        status = process.poll()
    if status == 0 and job.finished:
        return ""
    return f"exit status {status}{_last_words(job.log)}"


def _last_words(log: Path) -> str:
    """What a job said last: a line of bmtpt's, or else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("bmtpt ")]
    return f": {(ours or lines)[-1]}" if lines else ""
