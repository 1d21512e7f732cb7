"""A run that is killed or stopped at any moment and resumed ends as one that never was: bit for bit.

All runs are plain processes; `tests/distributed/test_signals.py` has the like under the launcher.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, toy

STEPS = 100  # two or three seconds, start not counted


class Stage(NamedTuple):
    """A run of one stage: its command but for the directory, and one that was never killed."""

    arguments: list
    outcome: str  # the file of tensors that it ends with
    unbroken: Path

    def command(self, run_dir: Path, *more: object) -> list:
        return [*self.arguments, "--run-dir", run_dir, *more]


@pytest.fixture(scope="module")
def stages(tmp_path_factory, untied_model, rows) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("resume")
    recipe = folder / "recipe.yaml"
    recipe.write_text(toy.recipe_text(untied_model, rows))
    run = ["run.save_every=5", "run.log_every=2", "evaluate.scoring=labels"]
    source = [f"source.steps={STEPS}", "source.eval_every=20", *run]
    adapt = [f"target.steps={STEPS}", "target.eval_every=20", *run]

    def settings(values: list[str]) -> list[str]:
        return [argument for value in values for argument in ("--set", value)]

    found = {
        "source": Stage(
            ["source", "--config", recipe, *settings(source)], "particles.safetensors", folder / "unbroken-source"
        ),
        "adapt": Stage(
            ["adapt", "--config", recipe, *settings(adapt), "--particles", folder / "unbroken-source"],
            "prompt.safetensors",
            folder / "unbroken-adapt",
        ),
    }
    seen = launch.run_commands([stage.command(stage.unbroken) for stage in found.values()], folder / "job")
    assert [s["status"] for s in seen] == [0, 0]
    return found


def _log(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(launch.COSTS)} for line in lines]


def _assert_ends_like(stage: Stage, run_dir: Path) -> None:
    """Tensors to the bit, and all that the log and the results say but for times."""
    right, found = load_file(stage.unbroken / stage.outcome), load_file(run_dir / stage.outcome)
    assert right.keys() == found.keys()
    for name, tensor in right.items():
        assert torch.equal(found[name], tensor), name
    assert _log(run_dir) == _log(stage.unbroken)
    results = [json.loads((folder / "results.json").read_text()) for folder in (stage.unbroken, run_dir)]
    assert results[0] == results[1]
    assert not list(run_dir.rglob("*.tmp"))  # half-written files of a killed process


def _checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run_dir / "checkpoints").glob("*.safetensors"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def _state(run_dir: Path) -> tuple:
    """Changes with every line of the log and every checkpoint."""
    log = run_dir / "metrics.jsonl"
    return log.stat().st_size if log.exists() else 0, [p.name for p in _checkpoints(run_dir)]


def _moves_on(run_dir: Path) -> Callable[[], bool]:
    """Whether there is a new line or checkpoint since now."""
    before = _state(run_dir)
    return lambda: _state(run_dir) != before


def _has_logged(part: float, stage: Stage, run_dir: Path) -> Callable[[], bool]:
    """Whether the log has grown to that part of what it is at the end."""
    whole, _ = _state(stage.unbroken)
    return lambda: _state(run_dir)[0] >= part * whole


def _kill_when(sign: Callable[[], bool], command: list[str], log: Path, delay: float = 0) -> bool:
    """Kills a run so many seconds after a sign of its; False if it was at its end by then, or before: one that is
    killed between its last word and its exit has nothing left to do."""
    with launch.started(command, log) as job:
        job.until(lambda: sign() or job.process.poll() == 0, "a sign to be killed at")
        time.sleep(delay)
        job.kill()  # by then it may have ended: to look first would leave a moment in which it does
        assert job.process.returncode in (0, -signal.SIGKILL), job.text
        return job.process.returncode != 0


def _go_on(stage: Stage, run_dir: Path, log: Path) -> None:
    launch.run(launch.forked(0, "-m", "bmtpt_ds", *stage.command(run_dir, "--resume")), log)


@pytest.mark.parametrize("name", ["source", "adapt"])
def test_killed_and_resumed_ends_as_if_never_killed(stages, tmp_path: Path, name: str) -> None:
    stage, run_dir = stages[name], tmp_path / "run"
    command = launch.plain(*stage.command(run_dir, "--resume"))
    assert _kill_when(_has_logged(random.uniform(0.01, 0.5), stage, run_dir), command, tmp_path / "log")
    assert not (run_dir / "results.json").exists()
    assert not (run_dir / stage.outcome).exists()
    _go_on(stage, run_dir, tmp_path / "log")
    _assert_ends_like(stage, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["source", "adapt"])
def test_killed_fifteen_times_at_random(stages, tmp_path: Path, name: str) -> None:
    stage, kills, attempt = stages[name], 0, 0
    while kills < 15:
        run_dir = tmp_path / f"run{attempt}"
        command = launch.plain(*stage.command(run_dir, "--resume"))
        while kills < 15 and _kill_when(_moves_on(run_dir), command, tmp_path / "log", random.uniform(0, 0.6)):
            kills += 1
        _go_on(stage, run_dir, tmp_path / "log")
        _assert_ends_like(stage, run_dir)
        attempt += 1


def test_stopped_by_signals_and_resumed(stages, tmp_path: Path) -> None:
    """SIGTERM, then SIGINT: a checkpoint of the last step, 128 + signal; while it runs nobody else may write there."""
    stage, run_dir = stages["source"], tmp_path / "run"
    command = launch.plain(*stage.command(run_dir, "--resume"))
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with launch.started(command, tmp_path / f"log of {status}") as job:
            job.until(_moves_on(run_dir), "a line or a checkpoint")
            time.sleep(0.2)
            if number == signal.SIGTERM:
                job.process.send_signal(signal.SIGSTOP)  # it lives, but does not end meanwhile
                _assert_refused_while_running(stage, run_dir, tmp_path)
                job.process.send_signal(signal.SIGCONT)
            job.process.send_signal(number)
            assert job.wait(60) == status, job.text
            assert "go on with --resume" in job.text
        stopped_at = _step(_checkpoints(run_dir)[-1])
        assert 0 < stopped_at < STEPS
        assert max(line["step"] for line in _log(run_dir)) in (stopped_at, stopped_at - 1)  # every other has a line
        assert not (run_dir / "results.json").exists()
    _go_on(stage, run_dir, tmp_path / "log of the end")
    _assert_ends_like(stage, run_dir)


def _assert_refused_while_running(stage: Stage, run_dir: Path, folder: Path) -> None:
    before = _state(run_dir)
    refused = [stage.command(run_dir, how) for how in ("--resume", "--overwrite")]
    for seen in launch.run_commands(refused, folder / "refused"):
        assert seen["status"] == 2
        assert "another process is running in it" in seen["stderr"]
    assert _state(run_dir) == before


class Case(NamedTuple):
    """A command on a directory that something has happened to, and what was seen."""

    run_dir: Path
    status: int
    stderr: str


@pytest.fixture(scope="module")
def cases(stages, tmp_path_factory) -> dict[str, Case]:
    """Copies of a run that was killed halfway, each treated in its own way, then a command for each, in one process."""
    folder, stage = tmp_path_factory.mktemp("cases"), stages["source"]
    killed = folder / "killed"
    assert _kill_when(lambda: len(_checkpoints(killed)) >= 2, launch.plain(*stage.command(killed)), folder / "log")

    (killed / "zero_shot.json").write_text("{}")  # as `bmtpt scale` leaves it beside a run

    def damaged(name: str, which: slice) -> Path:
        """A copy with some checkpoints, which are counted from the oldest, cut short."""
        copy = shutil.copytree(killed, folder / name)
        for checkpoint in _checkpoints(copy)[which]:
            checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
        return copy

    def killed_while_writing(name: str, *kept: str) -> Path:
        """What a kill leaves behind in the midst of a file, and these of the directory's files."""
        copy = shutil.copytree(killed, folder / name)
        for path in copy.iterdir():
            if path.name not in (*kept, ".lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (copy / "config.yaml", copy / "checkpoints/step-00000100.safetensors"):
            if path.parent.is_dir():
                path.with_name(f".{path.name}.99.tmp").write_bytes(b"half")
        return copy

    commands = {
        "killed in the first file": stage.command(killed_while_writing("killed in the first file"), "--resume"),
        "killed in a checkpoint": stage.command(
            killed_while_writing("killed in a checkpoint", "config.yaml", "checkpoints", "metrics.jsonl"), "--resume"
        ),
        "nothing there": stage.command(folder / "nothing there", "--resume"),
        "finished": stage.command(shutil.copytree(stage.unbroken, folder / "finished"), "--resume"),
        "newest damaged": stage.command(damaged("newest damaged", slice(-1, None)), "--resume"),
        "all damaged": stage.command(damaged("all damaged", slice(None)), "--resume"),
        "other recipe": stage.command(
            shutil.copytree(killed, folder / "other recipe"), "--resume", "--set", "source.lr=0.1"
        ),
        "neither": stage.command(shutil.copytree(killed, folder / "neither")),
        "overwritten": stage.command(shutil.copytree(killed, folder / "overwritten"), "--overwrite"),
    }
    seen = launch.run_commands(list(commands.values()), folder / "job")
    return {name: Case(folder / name, s["status"], s["stderr"]) for name, s in zip(commands, seen, strict=True)}


def _files(folder: Path) -> dict[str, bytes]:
    """Content of all files that a run may write, its lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_resume_with_nothing_there_starts(stages, cases) -> None:
    case = cases["nothing there"]
    assert case.status == 0
    _assert_ends_like(stages["source"], case.run_dir)


@pytest.mark.parametrize("where", ["killed in the first file", "killed in a checkpoint"])
def test_half_written_files_are_no_obstacle_and_go(stages, cases, where: str) -> None:
    assert cases[where].status == 0
    _assert_ends_like(stages["source"], cases[where].run_dir)


def test_resume_of_a_finished_run_changes_nothing(stages, cases) -> None:
    case = cases["finished"]
    assert case.status == 0
    assert "finished already" in case.stderr
    assert _files(case.run_dir) == _files(stages["source"].unbroken)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(stages, cases) -> None:
    case = cases["newest damaged"]
    newest = _checkpoints(cases["all damaged"].run_dir)[-1].name
    assert case.status == 0
    (line,) = [line for line in case.stderr.splitlines() if newest in line]
    assert "damaged" in line
    _assert_ends_like(stages["source"], case.run_dir)


def test_nothing_but_damaged_checkpoints_is_refused(cases) -> None:
    case = cases["all damaged"]
    assert case.status == 2
    assert _checkpoints(case.run_dir)[-1].name in case.stderr
    assert "--overwrite" in case.stderr
    assert _checkpoints(case.run_dir)  # left for a look at them


def test_resume_with_another_recipe_names_the_key(cases) -> None:
    case = cases["other recipe"]
    assert case.status == 2
    assert "source.lr" in case.stderr
    assert _files(case.run_dir) == _files(case.run_dir.parent / "killed")


def test_a_run_is_not_overwritten_unasked(cases) -> None:
    case = cases["neither"]
    assert case.status == 2
    assert "--resume or --overwrite" in case.stderr
    assert _files(case.run_dir) == _files(case.run_dir.parent / "killed")


def test_overwrite_starts_anew(stages, cases) -> None:
    case = cases["overwritten"]
    assert case.status == 0
    assert "source 1/" in case.stderr  # the first step was taken again
    assert not (case.run_dir / "zero_shot.json").exists()  # scores of what is gone
    _assert_ends_like(stages["source"], case.run_dir)
