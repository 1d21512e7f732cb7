"""A rank that raises, a rank that is killed: the job ends soon, says which rank it was, and the run goes on from there.

`tests/multinode` has the like of nodes that die or are cut off.
"""

import os
import random
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, toy

STEPS, TIMEOUT = 24, 10
WORKER = launch.ROOT / "tests/distributed/raising_worker.py"
SHORT = launch.ROOT / "tests/distributed/short_worker.py"


def source(recipe: Path, run_dir: Path) -> list[object]:
    settings = (f"source.steps={STEPS}", f"run.timeout={TIMEOUT}", "run.save_every=2", "run.keep=50")
    chosen = [argument for setting in settings for argument in ("--set", setting)]
    return ["source", "--config", recipe, "--run-dir", run_dir, "--deepspeed_config", "zero3_cpu", *chosen, "--resume"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, untied_model: Path, rows: Path) -> tuple[Path, torch.Tensor]:
    """The recipe, and the particles of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = folder / "recipe.yaml"
    recipe.write_text(toy.recipe_text(untied_model, rows))
    launch.run(launch.forked(2, "-m", "bmtpt_ds", *source(recipe, folder / "run")), folder / "log")
    return recipe, load_file(folder / "run/particles.safetensors")["particles"]


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("*.safetensors"))


def goes_on(recipe: Path, run_dir: Path, right: torch.Tensor) -> None:
    """All checkpoints can be read, and the run that goes on ends as one that was never broken off."""
    assert checkpoints(run_dir)
    for checkpoint in checkpoints(run_dir):
        load_file(checkpoint)
    assert not (run_dir / "results.json").exists()
    command = launch.forked(2, "-m", "bmtpt_ds", *source(recipe, run_dir))
    said = launch.run(command, run_dir.parent / "log of the end")
    assert "on from step " in said and "damaged" not in said
    assert torch.equal(load_file(run_dir / "particles.safetensors")["particles"], right)


def test_a_port_where_another_job_meets_is_one_line(unbroken, tmp_path: Path) -> None:
    recipe, _ = unbroken
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        command = launch.forked(1, "-m", "bmtpt_ds", *source(recipe, tmp_path / "run"), port=port)
        (said,) = launch.lines_of(launch.run(command, tmp_path / "log", status=2))
    assert said.startswith(f"bmtpt source: port {port} of this machine is in use")
    assert "deepspeed --master_port N" in said
    assert not (tmp_path / "run").exists()


def test_a_rank_that_raises_is_named(unbroken, tmp_path: Path) -> None:
    recipe, right = unbroken
    with launch.started(launch.deepspeed(2, WORKER, *source(recipe, tmp_path / "run")), tmp_path / "log") as job:
        job.until(lambda: "ArithmeticError" in job.text or (tmp_path / "run/checkpoints").exists(), "steps")
        begun = time.monotonic()
        assert job.wait(60) not in (0, 2)
        assert time.monotonic() - begun < TIMEOUT + 20
        job.until_gone(5)
    last = "\n".join(job.text.splitlines()[-6:])
    assert "ArithmeticError: the sums do not add up" in job.text
    node = os.uname().nodename
    assert f"bmtpt: rank 1 of 2 on {node} (" in job.text
    assert (
        f"rank 1 on {node} (" in last and "which said 'ArithmeticError" in last
    ) or f"rank 1 of 2 on {node} (" in last
    assert "then go on with --resume" in last
    goes_on(recipe, tmp_path / "run", right)


def test_a_rank_that_runs_out_of_memory_says_how_to_go_on(unbroken, tmp_path: Path) -> None:
    """The others wait in its pass; what it says, smaller micro-batches, is what the run then goes on with."""
    recipe, _ = unbroken
    command = source(recipe, tmp_path / "run")
    said = launch.run(launch.forked(2, SHORT, *command), tmp_path / "log", status=2)
    (line,) = [line for line in said.splitlines() if line.startswith("bmtpt source: ")]
    assert "out of memory with micro-batches of" in line
    setting = line.rpartition("go on with --resume --set ")[2]
    assert 0 < int(setting.removeprefix("run.max_tokens_per_micro_batch=")) < 200  # the step has some 80 tokens a rank
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(unbroken, tmp_path: Path) -> None:
    recipe, right = unbroken
    run_dir = tmp_path / "run"
    command = launch.deepspeed(2, "--module", "bmtpt_ds", *source(recipe, run_dir))
    with launch.started(command, tmp_path / "log") as job:
        job.until(lambda: len(checkpoints(run_dir)) >= 2, "two checkpoints")
        (rank,) = [p for p in job.members() if "--local_rank=1" in p.cmdline()]
        rank.kill()
        begun = time.monotonic()
        assert job.wait(60) not in (0, 2)
        assert time.monotonic() - begun < TIMEOUT + 20
        job.until_gone(5)
    last = "\n".join(job.text.splitlines()[-6:])
    assert "'--local_rank=1'" in last and "exits with return code = -9" in last
    goes_on(recipe, run_dir, right)


@pytest.mark.slow
def test_killed_twenty_times_at_random(unbroken, tmp_path: Path) -> None:
    """SIGKILL to all processes of the job: in a pass, in a gather, while a checkpoint is written. With those of
    tests/test_resume.py they are fifty."""
    recipe, right = unbroken
    kills, attempt = 0, 0
    while kills < 20:
        run_dir = tmp_path / f"run{attempt}"
        command = launch.deepspeed(2, "--module", "bmtpt_ds", *source(recipe, run_dir), "--set", "run.save_every=1")

        def saved(run_dir: Path = run_dir) -> list[Path]:
            return [*checkpoints(run_dir), *run_dir.glob("particles.safetensors")]

        while kills < 20 and not (run_dir / "particles.safetensors").exists():
            before = saved()
            with launch.started(command, tmp_path / "log") as job:
                job.until(lambda before=before, saved=saved: saved() != before, "a checkpoint")
                time.sleep(random.uniform(0, 0.6))
                kills += job.process.poll() is None
            for checkpoint in checkpoints(run_dir):
                load_file(checkpoint)
        said = launch.run(command, tmp_path / "log of the end")
        assert "damaged" not in said
        assert torch.equal(load_file(run_dir / "particles.safetensors")["particles"], right)
        attempt += 1
