"""How the time of a step of the source stage grows: with particles, tasks, prompt length and ranks.

Random weights, rows of one length (the mean of the paper's six source tasks), a row a task; a step is what a run does
with rows in hand: plan, padding, forward and backward pass, gather, SVGD with AdamW, broadcast. Each of particles M,
tasks kappa and prompt length L varies alone around M = 2, kappa = 6, L = 100; repeats take turns. `tokens` are those
that must be computed, `svgd` the seconds of the SVGD step in it. Ranks: one and two processes of one thread each, by
DeepSpeed's launcher, the same step dealt to them.

    python -m tests.benchmarks.growth [--model t5-small] [--repeats 3] [--out FILE]       FILE.png is the plot

Ends with one JSON line.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from tests.benchmarks.source_step import SHAPES, draw_rows, equally_long, make_model

BASE = {"M": 2, "kappa": 6, "L": 100}
VARIED = {"M": (1, 2, 5, 10), "kappa": (1, 2, 3, 4, 5, 6), "L": (20, 50, 100)}
TITLES = {"M": "particles M", "kappa": "tasks a step", "L": "prompt tokens L", "ranks": "ranks, a thread each"}


class Bench:
    """A loaded backbone that makes steps of any size."""

    def __init__(self, folder: Path, json_name: str = "resident"):
        from bmtpt_ds.config import ModelConfig, deepspeed_json
        from bmtpt_ds.parallel import Ranks, load_backbone

        self.ranks = Ranks(timeout=600)
        dtype = "bfloat16" if self.ranks.device.type == "cuda" else "float32"
        config = ModelConfig(name_or_path=str(folder), dtype=dtype, activation_checkpointing=False)
        self.model = load_backbone(self.ranks, config, deepspeed_json.load(json_name))

    def step(self, seed: int, *, M: int, kappa: int, L: int) -> dict[str, float]:
        """Seconds, of these in SVGD, and tokens of a step; the same rows for a seed, whatever M and L."""
        from bmtpt_ds.losses import GradientPass
        from bmtpt_ds.phases import Phases
        from bmtpt_ds.svgd import init_state, svgd_step_
        from tests.one_step import gradient_of_rows

        rows, phases = equally_long(draw_rows(seed))[:kappa], Phases(self.ranks.device)
        particles = torch.randn(
            M, L, self.model.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32
        ).to(self.ranks.device)
        flat = particles.view(M, -1)
        state, budget = init_state(flat, "adamw"), self.model.token_budget("auto", L + 512)
        gradient_pass = GradientPass(self.model, 0, budget, 0, phases)
        self._wait()
        begun = time.perf_counter()
        gradient = gradient_of_rows(gradient_pass, particles, rows).gradient
        with phases("svgd"):
            svgd_step_(flat, gradient.view_as(flat), state, lr=0.3, score_scale=-1.0)
        self.ranks.broadcast_(particles)
        self._wait()
        seconds = time.perf_counter() - begun
        phases.count_step()
        tokens = M * sum(L + len(row.source) + len(row.target) for row in rows)
        return {"seconds": seconds, "svgd": phases.take()["seconds_svgd"], "tokens": tokens}

    def _wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()


def medians(found: Iterable[dict[str, float]]) -> dict[str, float]:
    found = list(found)
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def in_one_process(folder: Path, repeats: int) -> dict[str, dict[int, dict[str, float]]]:
    bench = Bench(folder)
    sizes = {(name, value): BASE | {name: value} for name, values in VARIED.items() for value in values}
    found: dict[tuple[str, int], list] = {key: [] for key in sizes}
    for seed in range(repeats + 1):
        for key, size in sizes.items():
            step = bench.step(seed, **size)
            if seed:  # the first is for warming
                found[key].append(step)
    return {name: {value: medians(found[name, value]) for value in values} for name, values in VARIED.items()}


def on_ranks(folder: Path, ranks: int, repeats: int, out: Path) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    command += ["--module", "tests.benchmarks.growth", "--worker", str(folder), "--repeats", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=900)
    return json.loads(out.read_text())


def worker(folder: Path, repeats: int, out: Path) -> None:
    bench = Bench(folder)
    found = medians([bench.step(seed, **BASE) for seed in range(repeats + 1)][1:])
    if bench.ranks.first:
        out.write_text(json.dumps(found))


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(12, 3), layout="constrained")
    for panel, (name, steps) in zip(panels, found["steps"].items(), strict=True):
        values = [int(value) for value in steps]
        seconds = [step["seconds"] for step in steps.values()]
        panel.plot(values, seconds, "o-", label="a step")
        most = list(steps.values())[-1]
        by_tokens = [most["seconds"] * step["tokens"] / most["tokens"] for step in steps.values()]
        if name != "ranks":
            panel.plot(values, by_tokens, ":", color="gray", label="as the tokens")
        else:
            panel.plot(values, [seconds[0] / value for value in values], ":", color="gray", label="divided evenly")
        panel.set(xlabel=TITLES[name], xticks=values, ylim=(0, None))
        panel.legend(frameon=False)
    panels[0].set_ylabel("seconds")
    figure.suptitle(f"a step of the source stage, {found['model']}'s shape, {found['device']}")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="t5-small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.repeats, options.out)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(options.model, folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        counts = range(1, min(2, max(1, torch.cuda.device_count() or 2)) + 1)
        ranks = {count: on_ranks(folder, count, options.repeats, folder / f"ranks-{count}.json") for count in counts}
        steps = in_one_process(folder, options.repeats) | {"ranks": ranks}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    found = {"date": str(date.today()), "versions": versions, "model": options.model, "device": where, "steps": steps}
    for name, of_name in steps.items():
        for value, step in of_name.items():
            rate = step["tokens"] / step["seconds"]
            print(f"{TITLES[name]:24}{value:4}{step['seconds']:9.3f} s{rate:9.0f} tokens/s   svgd {step['svgd']:.4f} s")
    line = json.dumps(found)
    if options.out:
        options.out.write_text(line + "\n")
        plot(json.loads(line), options.out.with_suffix(".png"))
    print(line)


if __name__ == "__main__":
    main()
