"""Seconds of a step by its phases, without making anybody wait: a GPU's own clock where there is one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Phases:
    """Seconds spent in the named phases of the steps since the last `take` or `take_each`.

    On a GPU they are the GPU's: the host only marks where in its queue a phase begins and ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._restart()

    def _restart(self) -> None:
        self._spans: list[tuple[str, Any, Any]] = []  # phase, begin, end
        self._ends: list[tuple[int, Any]] = []  # of each step: how many spans there were by then, when
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        try:
            with torch.profiler.record_function(name):  # a range of that name in a trace
                yield
        finally:
            self._spans.append((name, start, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time counts for no step."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def count_step(self) -> None:
        self._ends.append((len(self._spans), self._mark()))

    def take(self) -> dict[str, float]:
        """`seconds` and `seconds_<phase>`, means over the steps counted since the last call. Waits for the GPU."""
        if self._on_gpu and self._spans:
            self._spans[-1][2].synchronize()
        sums = self._sums(self._spans)
        steps = max(1, len(self._ends))
        taken = {"seconds": (time.perf_counter() - self._since) / steps}
        taken |= {f"seconds_{name}": value / steps for name, value in sums.items()}
        self._restart()
        return {name: round(value, 6) for name, value in taken.items()}

    def take_each(self) -> list[dict[str, float]]:
        """Of every step counted since the last call its seconds by phase, and in `step` from the end of the step before
        (the first: from its first phase) to its own. Waits for the GPU."""
        if self._on_gpu and self._ends:
            self._ends[-1][1].synchronize()
        taken, first = [], 0
        began = self._spans[0][1] if self._spans else None
        for last, end in self._ends:
            taken.append({"step": self._between(began, end), **self._sums(self._spans[first:last])})
            first, began = last, end
        self._restart()
        return taken

    def _sums(self, spans: list[tuple[str, Any, Any]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for name, start, end in spans:
            sums[name] = sums.get(name, 0.0) + self._between(start, end)
        return sums
