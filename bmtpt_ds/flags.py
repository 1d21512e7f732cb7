"""What a step has to tell the host, read without making it wait."""

from collections import deque
from collections.abc import Iterator

import torch


class Flags:
    """Whether a step's numbers are finite and whether somebody wants to stop, on their way from the device."""

    def __init__(self, finite: torch.Tensor, wishes: torch.Tensor):
        """
        Args:
            finite: 0-d bool.
            wishes: 0-d, on how many ranks a signal has come.
        """
        flags = torch.stack([finite, wishes > 0])
        self._arrived = None
        if flags.is_cuda:
            self._flags = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._flags = flags

    def read(self) -> tuple[bool, bool]:
        """Waits for the device to have come to the end of the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        finite, stop = self._flags.tolist()
        return finite, stop


class LateFlags:
    """Reads the steps' flags without making the host wait: on a GPU a step late, when it works on the next one.

    All ranks read the same flags after the same step.
    """

    def __init__(self, device: torch.device):
        self._lag = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Flags]] = deque()

    def read(self, step: int, flags: Flags, *, now: bool) -> Iterator[tuple[int, bool, bool]]:
        """Step, whether it was finite, whether to stop, of the steps whose flags are due.

        Args:
            step, flags: of the step just begun.
            now: whether to wait for its flags too.
        """
        self._waiting.append((step, flags))
        while len(self._waiting) > (0 if now else self._lag):
            done, waiting = self._waiting.popleft()
            finite, stop = waiting.read()
            now |= stop  # the last step's belong into the checkpoint
            yield done, finite, stop
