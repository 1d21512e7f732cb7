"""Time of one SVGD step: eager torch, torch.compile of it, the kernels in two launches, the fused kernel.

A step reads theta, scores and Adam's two moments and writes theta and the moments: 7 M D numbers of 4 bytes is the
least that must pass through the GPU's memory, 14.3 MB at M = 5 and D = 102,400. That over the bandwidth of a large copy
is the floor, and `over_floor` says how far above it a step is.

GPU time is from device events around a queue of steps that the host has filled while the GPU slept, so that what is
measured is the GPU's work, one step behind another, and not the host's. Steps go around several sets of buffers that do
not fit its cache together: in a run the backbone's passes lie between two steps. `host_us` is what the host takes to
launch a step.

    python -m tests.benchmarks.svgd_step [--out FILE]     two minutes on a GPU; ends with one JSON line

Without a GPU it times the eager step on the CPU, and says so.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bmtpt_ds.svgd import init_state, svgd_direction, svgd_step_
from bmtpt_ds.svgd.backend import KernelOptions, Update
from bmtpt_ds.svgd.eager import Eager
from bmtpt_ds.svgd.fused import Fused
from tests.benchmarks.json_line import write_line

MS, DS = (5, 10, 32), (76_800, 102_400, 1_000_000)
PASSES = 7  # tensors that a step reads or writes
SETS_BYTES = 256e6  # of all sets of buffers together; the largest cache of a GPU is 126 MB
QUEUE = 800  # launches that fit the queue in front of a GPU
REPEATS = 7
LR = 0.3


class Buffers(NamedTuple):
    theta: torch.Tensor
    score: torch.Tensor
    state: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer


def make_sets(M: int, D: int, device: torch.device) -> list[Buffers]:
    """Enough of them that a step finds nothing of its own in the cache."""
    count = max(2, int(SETS_BYTES // (4 * M * D * 4)) + 1) if device.type == "cuda" else 1
    sets = []
    for i in range(count):
        generator = torch.Generator(device).manual_seed(i)
        theta, score = (torch.randn(M, D, device=device, generator=generator) for _ in range(2))
        theta = torch.nn.Parameter(theta.mul_(30))
        sets.append(Buffers(theta, score, init_state(theta.detach(), "adamw"), _torchs_adamw(theta)))
    return sets


def _torchs_adamw(theta: torch.nn.Parameter) -> torch.optim.Optimizer:
    on_gpu = theta.is_cuda
    return torch.optim.AdamW([theta], lr=LR, weight_decay=0.0, fused=on_gpu, capturable=on_gpu)


def eager(buffers: Buffers) -> None:
    buffers.theta.grad = -svgd_direction(buffers.theta.detach(), buffers.score, backend="reference").direction
    buffers.optimizer.step()


def kernels(backend: Fused, buffers: Buffers) -> None:
    svgd_step_(buffers.theta.detach(), buffers.score, buffers.state, lr=LR, backend=backend)


def compiled() -> Callable[[Buffers], None]:
    options, update = KernelOptions("median_log", "paper", 1.0), Update(True, LR, (0.9, 0.999), 1e-8, 0.0, None)
    step = torch.compile(
        partial(Eager().step_, options=options, update=update), dynamic=True
    )  # in D: compiled once for each M

    @torch.no_grad()
    def run(buffers: Buffers) -> None:
        step(buffers.theta.detach(), buffers.score, buffers.state)

    return run


def launches_of(step: Callable[[Buffers], None], buffers: Buffers) -> int | None:
    """Kernels, copies and fills that a step puts on the GPU; None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(buffers)
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type.name == "CUDA") or None


def gpu_microseconds(step: Callable[[Buffers], None], sets: list[Buffers], launches: int) -> float:
    """Median over the repeats of a step's device time."""
    steps, times = max(1, min(100, QUEUE // launches)), []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(100e6))  # cycles: the host is ahead before the first step begins
        start.record()
        for i in range(steps):
            step(sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / steps)
    return statistics.median(times)


def host_microseconds(step: Callable[[Buffers], None], sets: list[Buffers]) -> float:
    times = []
    for i in range(5 * REPEATS):
        began = time.perf_counter()
        step(sets[i % len(sets)])
        times.append((time.perf_counter() - began) * 1e6)
        if sets[0].theta.is_cuda:
            torch.cuda.synchronize()
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 28, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.nbytes / statistics.median(times)


def measure_gpu(particles: Sequence[int]) -> Iterator[dict]:
    bandwidth = copy_bandwidth()
    yield {"copy_bytes_per_second": bandwidth}
    two, one = partial(kernels, Fused(one_launch=False)), partial(kernels, Fused())
    for M in particles:
        torch._dynamo.reset()
        ways = {"eager": eager, "compiled": compiled(), "two launches": two, "fused": one}
        for D in DS:
            sets = make_sets(M, D, torch.device("cuda"))
            floor = PASSES * M * D * 4 / bandwidth * 1e6
            for name, step in ways.items():
                try:
                    yield {"M": M, "D": D, "way": name, "floor_us": floor, **measure_way(step, sets, floor)}
                except Exception as error:  # torch.compile wants a C compiler, which may not be there
                    yield {"M": M, "D": D, "way": name, "error": str(error).splitlines()[0][:200]}
            del sets
            torch.cuda.empty_cache()


def measure_way(step: Callable[[Buffers], None], sets: list[Buffers], floor: float) -> dict:
    for buffers in sets * 2:
        step(buffers)
    launches = launches_of(step, sets[0])
    found = gpu_microseconds(step, sets, launches or 100)
    return {
        "gpu_us": found,
        "over_floor": found / floor,
        "launches": launches,
        "host_us": host_microseconds(step, sets),
    }


def measure_cpu() -> Iterator[dict]:
    """The path of a machine without a GPU; small sizes, for it is not what anyone waits for."""
    for M in (5, 10):
        sets = make_sets(M, DS[0], torch.device("cpu"))
        for name, step in {"eager": eager, "auto": partial(kernels, "auto")}.items():
            yield {"M": M, "D": DS[0], "way": name, "cpu_us": host_microseconds(step, sets)}


def table(figures: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in figures for key in row))
    rows = [[_cell(row.get(key)) for key in columns] for row in figures]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows]]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON line")
    parser.add_argument("--particles", type=int, nargs="+", default=MS, metavar="M")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads: no GPU here"
    print(f"device: {device}")
    found = list(measure_gpu(options.particles) if on_gpu else measure_cpu())
    print(table([row for row in found if "way" in row]))
    result = {"benchmark": "svgd_step", "date": date.today().isoformat(), "device": device, "torch": torch.__version__}
    write_line(result | {"figures": found}, options.out)


if __name__ == "__main__":
    main()
