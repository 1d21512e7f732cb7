"""A source step on a GPU, its passes captured as CUDA graphs and not: the same weights and rows, one after the other.

Five particles of 100 tokens, a row of each of the paper's six tasks, random weights in bfloat16; so many steps of
different rows. `first`: a round over all of them, the host waiting after each step, where sizes are met for the first
time. `steady`: the last of three rounds, the host waiting at its end alone. The gradients of both ways must be the same
to the bit.

    python -m tests.benchmarks.cuda_graphs [--models t5-base t5-large] [--steps 24] [--out FILE]

Ends with one JSON line.
"""

import argparse
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, Prompts
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.phases import Phases
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.svgd import init_state, svgd_step_
from tests.benchmarks.json_line import write_line
from tests.benchmarks.source_step import SHAPES, draw_rows, make_model

M, L, LR = 5, 100, 3e-4


class Way:
    """Steps of one way."""

    def __init__(self, model: Sharded, steps: int, *, graphs: bool):
        device = model.ranks.device
        self.prompts = torch.randn(
            M, L, model.hidden_size, device=device, generator=torch.Generator(device).manual_seed(0)
        )
        self._particles = self.prompts.view(M, -1)
        self._state, self._stop = init_state(self._particles, "adamw"), StopSignal()
        budget = model.token_budget("auto", L + 512)
        self.gradient_of = GradientPass(model, 0, budget, 0, Phases(device), cuda_graphs=graphs)
        self._works = [self.gradient_of.prepare(StepRows.evenly(draw_rows(seed)), M, L) for seed in range(steps)]

    def gradient(self, number: int) -> torch.Tensor:
        return self.gradient_of(Prompts(self.prompts), self._works[number], number, self._stop).gradient

    def step(self, number: int) -> None:
        gradient = self.gradient(number).view_as(self._particles)
        svgd_step_(self._particles, gradient, self._state, lr=LR, score_scale=-1.0)

    def round(self, *, waiting: bool) -> list[float]:
        """Seconds of each step; unless the host waits their mean alone."""
        seconds, begun = [], time.perf_counter()
        for number in range(len(self._works)):
            self.step(number)
            if waiting:
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
                begun = time.perf_counter()
        torch.cuda.synchronize()
        return seconds or [(time.perf_counter() - begun) / len(self._works)]


def measure_way(model: Sharded, steps: int, *, graphs: bool) -> tuple[dict, list[torch.Tensor]]:
    """Figures, and the gradients of some steps before any is taken."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    way = Way(model, steps, graphs=graphs)
    gradients = [way.gradient(number).clone() for _ in range(2) for number in range(min(4, steps))]
    first = way.round(waiting=True)
    way.round(waiting=False)
    (steady,) = way.round(waiting=False)
    figures = {
        "first_ms": 1000 * statistics.median(first),
        "steady_ms": 1000 * steady,
        "captured": way.gradient_of.captured,
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }
    return figures, gradients


def measure(ranks: Ranks, name: str, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        make_model(name, Path(folder), torch.bfloat16, ranks.device)
        config = ModelConfig(name_or_path=folder, dtype="bfloat16")
        model = load_backbone(ranks, config, deepspeed_json.load("resident"))
    graphs, found = measure_way(model, steps, graphs=True)
    plain, right = measure_way(model, steps, graphs=False)
    assert all(map(torch.equal, found, right)), f"{name}: other gradients with graphs"
    return {"graphs": graphs, "plain": plain, "over_graphs": plain["steady_ms"] / graphs["steady_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=["t5-base", "t5-large"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cuda_graphs: no CUDA device here")
    ranks = Ranks(timeout=600)
    versions = {name: version(name) for name in ("torch", "triton", "transformers", "deepspeed")}
    found = {"date": str(date.today()), "device": torch.cuda.get_device_name(), "versions": versions}
    found["models"] = {name: measure(ranks, name, options.steps) for name in options.models}
    for name, figures in found["models"].items():
        for way in ("graphs", "plain"):
            print(name, way, *(f"{key} {value:.4g}" for key, value in figures[way].items()), sep="  ")
    write_line(found, options.out)


if __name__ == "__main__":
    main()
