"""Ctrl-C and SIGTERM: a flag that the loops carry to all ranks, so that all stop at the same step."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import psutil

# A launcher answers Ctrl-C by a SIGTERM to its children right after the terminal's SIGINT: both mean the same wish.
_SAME_WISH_SECONDS = 2.0


class Stopped(Exception):
    """Raised when a run has stopped for a signal, its checkpoint written."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopSignal:
    """While in use, SIGINT and SIGTERM set `received` instead of ending the process; a second one ends it at once.

    Ending the `deepspeed` command does the same as SIGTERM: it passes no signal on and would leave the ranks running.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._at = 0.0
        self._launched_by = _launched_by()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int | None:
        """The first signal that came."""
        if self._received is None and self._launched_by and _launched_by() != self._launched_by:
            self._received, self._at = signal.SIGTERM, time.monotonic()
        return self._received

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None and now - self._at > _SAME_WISH_SECONDS:
            os._exit(128 + number)
        if self._received is None:
            self._received, self._at = number, now

    def stopped(self) -> Stopped:
        """The exception for this process; SIGTERM where the wish came from another rank."""
        return Stopped(self._received or signal.SIGTERM)


def _launched_by() -> tuple[int, int] | None:
    """Ids of DeepSpeed's launching process and of the `deepspeed` command above it, if they started this process."""
    try:
        launcher = psutil.Process(os.getppid())
        command = launcher.parent()
        if command is None or "deepspeed.launcher.launch" not in launcher.cmdline():
            return None
        # elsewhere than on the command's own machine a remote shell stands in its place
        words = {Path(word).name for word in command.cmdline()[:3]}
    except psutil.Error:
        return None
    return (launcher.pid, command.pid) if words & {"deepspeed", "ds", "deepspeed.launcher.runner"} else None
