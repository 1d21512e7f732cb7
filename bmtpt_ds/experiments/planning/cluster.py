"""What the machines can do: figures that were given, or that `bmtpt profile` has measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.wire import tree_depth

PROFILE = "bmtpt profile"  # `format` of a profile's JSON
GB = 10**9


@dataclass(frozen=True)
class Speed:
    """Of a link, as `wire` counts it."""

    bytes_per_second: float
    latency: float  # seconds a hop


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices. The defaults are a cautious A100: give your own, or a profile's."""

    on_cpu: bool = False
    gpus: int = 8  # of a node: ranks
    nodes: int = 1
    memory: float = 80 * GB  # bytes of a rank; of CPU ranks as profiled, of all of a node together
    memory_shared: bool = False  # whether the ranks of a node have it of one whole: fewer have more each
    flops: float = 120e12  # a second that the passes of T5 reach, recomputation counted
    launch: float = 0.0005  # seconds that a block costs a pass at least: a GPU's host has to start some 100 kernels
    inside: Speed = Speed(100 * GB, 10e-6)  # between the ranks of a node
    between: Speed = Speed(12.5 * GB, 30e-6)  # between nodes
    host: Speed = Speed(20 * GB, 10e-6)  # from a rank's host memory
    assembly: float = 2e-12  # seconds a byte of gathered weights beside the wire: buffers, copies
    svgd: float = 30e-12  # seconds a number of the particles: what a step moves, over a GPU's memory bandwidth

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def overlaps(self) -> bool:
        """Whether weights are gathered, and kernels started, while the device computes."""
        return not self.on_cpu

    def of_ranks(self, ranks: int) -> "Cluster":
        """As many ranks on as few such nodes as hold them."""
        gpus = min(ranks, self.gpus)
        memory = self.memory * self.gpus / gpus if self.memory_shared else self.memory
        return replace(self, gpus=gpus, nodes=-(-ranks // self.gpus), memory=memory)

    def given(
        self,
        *,
        gpus: int,
        nodes: int,
        memory: float | None = None,
        tflops: float | None = None,
        inside: float | None = None,
        between: float | None = None,
    ) -> "Cluster":
        """The same with what a person knows: GB of memory, TFLOP/s of a rank, GB/s of the links."""
        known = {"memory": memory and memory * GB, "flops": tflops and tflops * 1e12}
        if self.on_cpu and not memory:
            known |= {"memory": self.memory / gpus, "memory_shared": True}  # a profile has measured the machine's
        for name, rate in (("inside", inside), ("between", between)):
            known[name] = rate and replace(getattr(self, name), bytes_per_second=rate * GB)
        return replace(self, gpus=gpus, nodes=nodes, **{name: value for name, value in known.items() if value})

    @property
    def link(self) -> Speed:
        """The slowest link of a ring over all ranks."""
        if self.nodes == 1:
            return self.inside
        slowest = min(self.inside.bytes_per_second, self.between.bytes_per_second)
        return Speed(slowest, max(self.inside.latency, self.between.latency))


def calibrated(cluster: Cluster, files: Sequence[Path]) -> Cluster:
    """A cluster as profiles have found it; where several say the same, the last one counts.

    How fast the passes are is told by profiles of resident models where there are some: in the passes of a sharded one
    weights are gathered, and what that takes is told by the difference.

    Raises:
        UserError: a file that is no profile's JSON.
    """
    profiles = [profile for file in files for profile in _profiles(file)]
    try:
        for profile in [p for p in profiles if not _gathers(p)] or profiles:
            cluster = _with_device(cluster, profile)
        for profile in profiles:
            cluster = _with_gathering(_with_link(cluster, profile), profile)
    except (LookupError, TypeError, AttributeError, ZeroDivisionError):
        names = " ".join(map(str, files))
        raise UserError(f"--profile {names}: not whole, or of another version of bmtpt; {_MEND}") from None
    return cluster


def _profiles(file: Path) -> list[dict]:
    """What `bmtpt profile --json` has written of each model.

    Raises:
        UserError: something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--profile {file}: {getattr(error, 'strerror', None) or 'not JSON'}; {_MEND}") from None
    if not isinstance(values, dict) or values.get("format") != PROFILE:
        raise UserError(f"--profile {file}: not a profile; {_MEND}")
    profiles = values.get("profiles")
    if not isinstance(profiles, list) or not all(isinstance(profile, dict) for profile in profiles):
        raise UserError(f"--profile {file}: not whole; {_MEND}")
    return profiles


_MEND = "give a file that `bmtpt profile --json FILE` has written"


def _with_link(cluster: Cluster, profile: dict) -> Cluster:
    if profile["link"] is None:  # a rank alone
        return cluster
    speed = Speed(profile["link"]["bytes_per_second"], profile["link"]["latency"])
    return replace(cluster, **{"between" if profile["nodes"] > 1 else "inside": speed})


def _with_device(cluster: Cluster, profile: dict) -> Cluster:
    on_cpu = profile["device"]["type"] == "cpu"
    stage = profile["stages"].get("source") or profile["stages"]["target"]
    seconds, smallest = stage["seconds"], profile["smallest_pass"]
    passes, spent = stage["passes"], seconds["forward"]["median"] + seconds["backward"]["median"]
    flops = stage["flops_computed"] / profile["ranks"]
    least = passes * smallest["seconds"]
    if spent < 1.2 * least:  # small passes: how fast large ones would be is a guess
        rate = 0.5 * profile["device"]["matmul_flops"]
    elif on_cpu:
        rate = (flops - passes * smallest["flops"]) / (spent - least)
    else:  # kernels are started while others run: the slower of both counts
        rate = flops / spent
    changed: dict[str, Any] = {"on_cpu": on_cpu, "flops": rate}
    if not _gathers(profile):
        changed["launch"] = max(0.0, smallest["seconds"] - smallest["flops"] / rate * on_cpu) / profile["blocks"]
    if "svgd" in seconds:
        numbers = profile["particles"] * profile["prompt_length"] * profile["hidden_size"]
        changed["svgd"] = seconds["svgd"]["median"] / numbers
    return replace(cluster, memory=float(profile["device"]["memory"]), **changed)


def _gathers(profile: dict) -> bool:
    """Whether its passes gather weights."""
    return profile.get("zero", {}).get("stage") == 3 and profile.get("ranks", 1) > 1


def _with_gathering(cluster: Cluster, profile: dict) -> Cluster:
    """What gathering takes beside the wire: the smallest pass of a sharded model is hardly anything else. What a pass
    costs without it is known where a profile of a resident model came before."""
    if not _gathers(profile):
        return cluster
    ranks, blocks, smallest = profile["ranks"], profile["blocks"], profile["smallest_pass"]
    seconds = smallest["seconds"]
    if cluster.on_cpu:
        seconds -= smallest["flops"] / cluster.flops + blocks * cluster.launch
    stage = profile["stages"].get("source") or profile["stages"]["target"]
    sent = stage["wire"]["weights"] / stage["passes"]
    link = cluster.between if profile["nodes"] > 1 else cluster.inside
    seconds -= sent / link.bytes_per_second + 2 * blocks * tree_depth(ranks) * link.latency
    return replace(cluster, assembly=max(0.0, seconds) / (sent * ranks / (ranks - 1)))
