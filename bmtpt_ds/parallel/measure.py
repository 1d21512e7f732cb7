"""What the ranks' devices and the links between them can do, and what a step takes of them."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import deepspeed.comm as dist
import psutil
import torch

from bmtpt_ds.parallel.ranks import Ranks

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what clear_refs takes for VmHWM
_LINK_BYTES = 16 << 20  # about a block of T5-base in float32


class Device(NamedTuple):
    """One rank's, while all of them work."""

    name: str
    memory: int  # bytes, of a GPU or of the machine
    matmul_flops: float  # operations a second in large products of the model's dtype: the measured peak


class Link(NamedTuple):
    """Between ranks: the slowest of the ring that they form."""

    latency: float  # seconds that a hop takes
    bytes_per_second: float  # through a rank, each way


def measure_device(ranks: Ranks, dtype: torch.dtype) -> Device:
    """Large matrix products on all ranks at once; the slowest rank's figure. All ranks must ask together."""
    device, on_gpu = ranks.device, ranks.device.type == "cuda"
    n = 8192 if on_gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ranks.gather(None)  # all begin together
    seconds = min(_seconds_of(lambda: a @ b, device, 8 if on_gpu else 2) for _ in range(5))
    slowest = max(ranks.gather(seconds))
    if on_gpu:
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name, memory = f"cpu, {torch.get_num_threads()} threads", psutil.virtual_memory().total
    return Device(name, memory, 2 * n**3 / slowest)


def measure_link(ranks: Ranks) -> Link | None:
    """Latency by small all-reduces, bandwidth by the all-gathers that ZeRO-3 makes; None for a rank alone.

    All ranks must ask together.
    """
    if ranks.world == 1:
        return None
    word = torch.zeros(1, device=ranks.device)
    part = torch.zeros(_LINK_BYTES // 4 // ranks.world, device=ranks.device)
    whole = part.new_empty(len(part) * ranks.world)
    times = []
    for collective in (partial(dist.all_reduce, word), partial(dist.all_gather_into_tensor, whole, part)):
        _seconds_of(collective, ranks.device, 3)  # warm
        ranks.gather(None)
        times.append(max(ranks.gather(min(_seconds_of(collective, ranks.device, 4) for _ in range(5)))))
    hops = 2 * (ranks.world - 1).bit_length()
    latency = times[0] / hops
    moved = whole.nbytes * (ranks.world - 1) / ranks.world
    return Link(latency, moved / max(times[1] - (ranks.world - 1) * latency, 1e-9))


def _seconds_of(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean seconds of some calls in a row, the device's work included."""
    wait_for(device)
    begun = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - begun) / times


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory` begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # another kernel, or not allowed: then the peak is the process's
        _CLEAR.write_text(_RESET_PEAK)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this rank's tensors took on its GPU, or the process on a CPU, since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1]) * 1024 if found else psutil.Process(os.getpid()).memory_info().rss


@contextmanager
def gathered_weights() -> Iterator[list[int]]:
    """Inside, DeepSpeed's all-gathers of sharded weights are listed: bytes that this rank sends in each."""
    backend, sent = dist.comm.cdb, []
    gather = backend.all_gather_into_tensor

    def counted(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *rest: object, **named: object) -> object:
        sent.append(output_tensor.nbytes - input_tensor.nbytes)  # round a ring: all parts but one's own go past a rank
        return gather(output_tensor, input_tensor, *rest, **named)

    backend.all_gather_into_tensor = counted
    try:
        yield sent
    finally:
        del backend.all_gather_into_tensor  # the class's own is there again
