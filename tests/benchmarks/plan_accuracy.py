"""How near `bmtpt plan` comes: seconds of a step of the source stage, predicted over measured.

CPU ranks of one thread each, random weights, rows of typical lengths. One profile calibrates, other sizes (particles,
prompt, tasks, another model, recomputed activations, another layout) are predicted and then measured:
- `one rank`: calibrated by a step of t5-small's shape.
- `two ranks`: on one machine, calibrated by a resident step and one under ZeRO-3.
- `two nodes`: likewise, on two network namespaces, whose cables tc then limits to some bandwidths; the plan is told
  these. Only root may make such nodes; tests/multinode/install.sh brings what else they need.

    python -m tests.benchmarks.plan_accuracy [part ...] [--steps 5] [--out FILE]     ends with one JSON line
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from bmtpt_ds.config import load_recipe
from bmtpt_ds.experiments.planning.cluster import Cluster, calibrated
from bmtpt_ds.experiments.planning.job import Job
from bmtpt_ds.experiments.planning.predict import predict
from bmtpt_ds.model.shapes import architecture_by_name
from bmtpt_ds.stage_inputs import source_tasks
from tests import launch
from tests.benchmarks.json_line import write_line
from tests.multinode.nodes import Nodes, missing, network

BASE = ("prompt.length=20", "source.particles=2", "source.tasks=[sst2,cola,mnli]")
BOTH = ("resident", "zero3_cpu")
BANDWIDTHS = (1000, 250)  # Mbit/s
Profile = Callable[[Sequence[object], Path], None]  # arguments of `bmtpt profile`, a log


class Case(NamedTuple):
    """What is profiled."""

    name: str
    overrides: tuple[str, ...] = ()
    model: str = "t5-small"
    layout: str = "resident"


ONE_RANK = (
    Case("four particles", ("source.particles=4",)),
    Case("a prompt of 80 tokens", ("prompt.length=80",)),
    Case("longer rows", ("source.tasks=[qnli,squad]",)),
    Case("another model", model="t5-v1_1-small"),
    Case("a model of four times the size", ("source.particles=1",), model="t5-base"),
    Case("recomputed", ("model.activation_checkpointing=true",)),
)
TWO_RANKS = (
    Case("four particles", ("source.particles=4",)),
    Case("ZeRO-3, a prompt of 80 tokens", ("prompt.length=80",), layout="zero3_cpu"),
    Case("ZeRO-3, four particles", ("source.particles=4",), layout="zero3_cpu"),
    Case("ZeRO-3, another model", model="t5-v1_1-small", layout="zero3_cpu"),
)


def arguments(case: Case, file: Path, steps: int) -> list[object]:
    overrides = [word for override in (*BASE, *case.overrides) for word in ("--set", override)]
    what = ["--random-init", case.model, "--deepspeed_config", case.layout, "--stage", "source", "--steps", steps]
    return ["profile", *what, *overrides, "--json", file]


def predicted(case: Case, cluster: Cluster) -> dict[str, float]:
    recipe = load_recipe("paper", [f"model.name_or_path={case.model}", *BASE, *case.overrides])
    found = predict(Job(architecture_by_name(case.model), recipe, source_tasks(recipe)), cluster, case.layout)
    return {name: getattr(found, name) for name in ("step", "compute", "gathering", "traffic")}


def compare(case: Case, cluster: Cluster, profile: Profile, folder: Path, steps: int) -> dict:
    file = folder / "case.json"
    profile(arguments(case, file, steps), folder / "case.log")
    (measured,) = json.loads(file.read_text())["profiles"]
    step, expected = measured["stages"]["source"]["seconds"]["step"]["mean"], predicted(case, cluster)
    found = {"case": case.name, "predicted": expected, "measured": step, "ratio": expected["step"] / step}
    print(f"{case.name:44}{expected['step']:9.3f} s{step:9.3f} s{found['ratio']:7.2f}", flush=True)
    return found


def calibrate(profile: Profile, folder: Path, steps: int, layouts: Sequence[str] = ("resident",)) -> Cluster:
    files = [folder / f"{layout}.json" for layout in layouts]
    for layout, file in zip(layouts, files, strict=True):
        profile(arguments(Case("base", layout=layout), file, steps), file.with_suffix(".log"))
    return calibrated(Cluster(), files)


def alone(words: Sequence[object], log: Path) -> None:
    launch.run(launch.plain(*words), log)


def on_two_ranks(words: Sequence[object], log: Path) -> None:
    launch.run(launch.deepspeed(2, "--module", "bmtpt_ds", *words), log)


def one_rank(folder: Path, steps: int) -> list[dict]:
    cluster = calibrate(alone, folder, steps).given(gpus=1, nodes=1)
    return [compare(case, cluster, alone, folder, steps) for case in ONE_RANK]


def two_ranks(folder: Path, steps: int) -> list[dict]:
    cluster = calibrate(on_two_ranks, folder, steps, BOTH).given(gpus=2, nodes=1)
    return [compare(case, cluster, on_two_ranks, folder, steps) for case in TWO_RANKS]


@contextmanager
def cable(nodes: Nodes, megabits: int) -> Iterator[None]:
    """Inside, each node sends no faster than that."""
    rate = ["tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "400ms"]
    for node in nodes.nodes:
        subprocess.run(node.inside("tc", "qdisc", "add", "dev", "eth0", "root", *rate), check=True)
    try:
        yield
    finally:
        for node in nodes.nodes:
            subprocess.run(node.inside("tc", "qdisc", "del", "dev", "eth0", "root"), check=True)


def two_nodes(folder: Path, steps: int) -> list[dict] | str:
    if reason := missing():
        print(f"two nodes: left out: {reason}", flush=True)
        return reason
    with network(folder, 2) as nodes:
        work = folder / "work"
        work.mkdir()
        names = ("DS_ACCELERATOR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "TORCH_EXTENSIONS_DIR")
        own = launch.environment() | {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions")}
        lines = [f"{name}={own[name]}\n" for name in names]
        (work / ".deepspeed_env").write_text("".join([*lines, "GLOO_SOCKET_IFNAME=eth0\n"]))

        def on_nodes(words: Sequence[object], log: Path) -> None:
            options = ["--no_ssh_check", "--hostfile", nodes.hostfile(), "--master_port", launch.free_port()]
            script = [launch.ROOT / "launchers/multinode.sh", *options, "--master_addr", nodes[0].address, "--", *words]
            launch.run(nodes[0].inside("env", "-C", work, "bash", *script), log, variables=nodes.variables())

        cluster, found = calibrate(on_nodes, folder, steps, BOTH), []
        for megabits in BANDWIDTHS:
            limited = cluster.given(gpus=1, nodes=2, between=megabits / 8 / 1000)
            with cable(nodes, megabits):
                for case in (
                    Case(f"{megabits} Mbit/s, ZeRO-3", layout="zero3_cpu"),
                    Case(f"{megabits} Mbit/s, resident"),
                ):
                    found.append(compare(case, limited, on_nodes, folder, steps))
    return found


PARTS = {"one rank": one_rank, "two ranks": two_ranks, "two nodes": two_nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"default: all; {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
    }
    for name in options.parts or PARTS:
        print(f"{name:44}{'predicted':>11}{'measured':>11}{'ratio':>7}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = PARTS[name](Path(folder), options.steps)
    write_line(found, options.out)


if __name__ == "__main__":
    main()
