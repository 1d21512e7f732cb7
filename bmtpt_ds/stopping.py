"""Ctrl-C and SIGTERM: a flag that the loops carry to all ranks, so that all stop at the same step."""

import os
import signal
import time
from types import FrameType

# A launcher answers Ctrl-C by a SIGTERM to its children right after the terminal's SIGINT: both mean the same wish.
_SAME_WISH_SECONDS = 2.0


class Stopped(Exception):
    """Raised when a run has stopped for a signal, its checkpoint written."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopSignal:
    """While in use, SIGINT and SIGTERM set `received` instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None and now - self._at > _SAME_WISH_SECONDS:
            os._exit(128 + number)
        if self.received is None:
            self.received, self._at = number, now

    def stopped(self) -> Stopped:
        """The exception for this process; SIGTERM where the wish came from another rank."""
        return Stopped(self.received or signal.SIGTERM)
