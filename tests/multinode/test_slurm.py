"""slurm.sbatch under a real Slurm: a controller, a node and a munge daemon of the test's own, on this machine."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import launch, toy

pytestmark = pytest.mark.slurm

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS = 60


class Slurm:
    """One node with two cores."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        for name in ("state", "spool", "work"):
            (folder / name).mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        host = socket.gethostname()
        settings = {
            "ClusterName": "bmtpt",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={folder}/socket",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmctldPort": launch.free_port(),
            "SlurmdPort": launch.free_port(),
            "ReturnToService": 2,
            "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN",
            "PartitionName": "main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        }
        (folder / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self.environment = launch.environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += f":{_PATH}"

    def start(self) -> None:
        munge = ["--foreground", "--force", f"--key-file={self.folder}/key", f"--socket={self.folder}/socket"]
        munge += [f"--{what}-file={self.folder}/munge.{what}" for what in ("pid", "seed", "log")]
        for command in (["munged", *munge], ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with (self.folder / f"{command[0]}.log").open("w") as log:
                self._daemons.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
                )
            time.sleep(1)
        end = time.monotonic() + 30
        while "idle" not in self.call("sinfo", "-h", "-o", "%T", check=False):
            assert time.monotonic() < end, [(f.name, f.read_text()[-500:]) for f in self.folder.glob("*.log")]
            time.sleep(0.5)

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            with suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(daemon.pid).children(recursive=True), daemon]:
                    process.kill()
            daemon.wait(10)

    def call(self, *command: object, check: bool = True) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            cwd=self.folder / "work",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: object) -> str:
        script = launch.ROOT / "launchers/slurm.sbatch"
        return self.call("sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", script, *arguments).strip()

    def state(self, job: str) -> str:
        return self.call("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]

    def until_ended(self, job: str, seconds: float) -> str:
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in _ENDED:
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.5)
        return state

    def log(self, job: str) -> str:
        path = self.folder / "work" / f"bmtpt-{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("only root may start a Slurm of one's own")
    if absent := [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]:
        pytest.skip(f"missing: {', '.join(absent)}; Debian: apt-get install slurmctld slurmd slurm-client munge")
    # munge wants a folder that others cannot write above its socket: pytest's own are so
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, untied_model: Path, rows: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(toy.recipe_text(untied_model, rows).replace("steps: 6", f"steps: {STEPS}", 1))
    return path


def source(recipe: Path, run_dir: Path) -> list:
    return ["source", "--config", recipe, "--run-dir", run_dir, "--deepspeed_config", "zero3_cpu", "--resume"]


@pytest.fixture(scope="module")
def unbroken(slurm: Slurm, recipe: Path) -> torch.Tensor:
    """The particles of a job that ran through."""
    run_dir = recipe.parent / "unbroken"
    job = slurm.submit(*source(recipe, run_dir))
    assert slurm.until_ended(job, 120) == "COMPLETED", slurm.log(job)
    assert "sharded over 2 cpu ranks (ZeRO-3)" in slurm.log(job)
    return load_file(run_dir / "particles.safetensors")["particles"]


def test_a_job_learns_what_two_ranks_do(unbroken: torch.Tensor, recipe: Path, tmp_path: Path) -> None:
    command = launch.forked(2, "-m", "bmtpt_ds", *source(recipe, tmp_path / "run"))
    launch.run(command, tmp_path / "log")
    assert torch.equal(unbroken, load_file(tmp_path / "run/particles.safetensors")["particles"])


def test_a_job_is_looked_over(slurm: Slurm, recipe: Path) -> None:
    job = slurm.submit("check", "--config", recipe, "--launch")
    assert slurm.until_ended(job, 60) == "COMPLETED", slurm.log(job)
    assert "2 ranks on 1 node\n" in slurm.log(job) and slurm.log(job).rstrip().endswith("\nok")


def test_a_mistake_fails_the_job(slurm: Slurm, recipe: Path, tmp_path: Path) -> None:
    job = slurm.submit(*source(recipe, tmp_path / "run"), "--set", "source.lr=-1")
    assert slurm.until_ended(job, 60) == "FAILED"
    assert "bmtpt source: " in slurm.log(job) and "source.lr" in slurm.log(job)


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(
    slurm: Slurm, unbroken: torch.Tensor, recipe: Path, tmp_path: Path
) -> None:
    """The signal that Slurm sends before the end of the time; it lets a job wait for two minutes and more then."""
    run_dir = tmp_path / "run"
    job = slurm.submit(*source(recipe, run_dir))
    end = time.monotonic() + 60
    while len(list((run_dir / "checkpoints").glob("*.safetensors"))) < 2:
        assert time.monotonic() < end, slurm.log(job)
        time.sleep(0.05)
    slurm.call("scancel", "--batch", "--signal=TERM", job)
    assert slurm.until_ended(job, 400) == "COMPLETED", slurm.log(job)
    said = slurm.log(job)
    assert "stopped by SIGTERM; go on with --resume" in said
    assert f"{STEPS} steps, on from step " in said
    assert torch.equal(load_file(run_dir / "particles.safetensors")["particles"], unbroken)
