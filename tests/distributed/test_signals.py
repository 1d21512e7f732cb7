"""A job of two ranks under the `deepspeed` launcher that is told to stop: a checkpoint, and nothing left running."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch

STEPS = 24
SECONDS = 20  # within which a job that is told to stop has written its checkpoint and is gone


def _source(recipe: Path, run_dir: Path) -> list[object]:
    settings = (
        f"source.steps={STEPS}",
        "source.eval_every=9",
        "evaluate.scoring=labels",
        "run.log_every=1",
        "run.save_every=1000",
    )
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    ds = ("--deepspeed_config", "zero3_cpu")
    return ["source", "--config", recipe, "--run-dir", run_dir, *ds, *arguments, "--resume"]


def _log(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in line.items() if not k.startswith(launch.COSTS)} for line in lines]


def _last_step(run_dir: Path) -> int:
    return max((line["step"] for line in _log(run_dir)), default=0)


def _stop(command: list[str], run_dir: Path, log: Path, how: str) -> int:
    """Lets a job take a few steps, tells it to stop, checks what it leaves; the step of its checkpoint."""
    begun = _last_step(run_dir)
    with launch.started(command, log) as job:
        job.until(lambda: _last_step(run_dir) >= begun + 3, "three steps")
        assert len(job.members()) >= 4  # the command, its launching process, two ranks
        if how == "command":
            job.process.send_signal(signal.SIGTERM)  # what `kill` of the id that one knows does
        else:
            os.killpg(job.process.pid, signal.SIGINT)  # Ctrl-C in a terminal
        job.until_gone(SECONDS)
        assert job.process.returncode != 0
    newest = max((run_dir / "checkpoints").iterdir())
    step = int(newest.stem.removeprefix("step-"))
    # a line for every step: rank 0 went no further than its checkpoint, and no rank waited for another in vain
    assert begun + 3 <= step == _last_step(run_dir) < STEPS
    assert not (run_dir / "results.json").exists()
    return step


@pytest.mark.parametrize("ways", [("command",), pytest.param(("group", "command"), marks=pytest.mark.slow)])
def test_stopped_job_leaves_a_checkpoint_and_goes_on_as_if_never_stopped(
    ways: Sequence[str], recipe: Path, tmp_path: Path
) -> None:
    run_dir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    launch.run(launch.forked(2, "-m", "bmtpt_ds", *_source(recipe, unbroken)), tmp_path / "log of unbroken")
    for how in ways:
        command = launch.deepspeed(2, "--module", "bmtpt_ds", *_source(recipe, run_dir))
        _stop(command, run_dir, tmp_path / f"log of {how}", how)
    launch.run(launch.forked(2, "-m", "bmtpt_ds", *_source(recipe, run_dir)), tmp_path / "log of end")
    right, found = (load_file(folder / "particles.safetensors")["particles"] for folder in (unbroken, run_dir))
    assert torch.equal(found, right)
    assert _log(run_dir) == _log(unbroken)
