"""Which ranks live: each tells the job's store so, and one that fails for want of another can name it.

A collective that fails says at best that a connection broke or that time is up, on every rank that is left, and never
who was the first to go.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch

_BEAT = 1.0  # seconds between two signs of life
_SILENCE = 4.0  # seconds without one, after which a rank is gone
_ANSWER = timedelta(seconds=5)  # for the store to answer in; it lives in rank 0


class Pulse:
    """This rank's signs of life, and a look at those of the others."""

    def __init__(self, rank: int, world: int, timeout: timedelta):
        """Begins to beat, in a thread of its own, over a connection of its own to the store that the ranks met at.

        Args:
            timeout: for rank 0 to come here too.
        """
        self._rank, self._world = rank, world
        self._beats = self._connect(timeout)
        self._beats.set(f"bmtpt/node/{rank}", node_name())
        self._first_node = self._beats.get("bmtpt/node/0").decode()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    @staticmethod
    def _connect(timeout: timedelta = _ANSWER) -> torch.distributed.TCPStore:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch.distributed.TCPStore(host, port, is_master=False, timeout=timeout)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and so is the job
            while not self._stopped.wait(_BEAT):
                self._beats.add(f"bmtpt/pulse/{self._rank}", 1)

    def stop(self) -> None:
        """Ends the thread: one that Python finds in the library's code at its own end aborts the process."""
        self._stopped.set()
        self._thread.join(2 * _ANSWER.total_seconds())

    def why(self, error: Exception) -> str:
        """For a rank that fails with `error`: who was gone or failed before it, for a person; "" if nobody was."""
        try:
            store = self._connect()
            place = store.add("bmtpt/failures", 1)
            store.set(f"bmtpt/failed/{place}", f"{self._rank} {' '.join(f'{type(error).__name__}: {error}'.split())}")
            silent = self._silent(store)
            failed = [store.get(f"bmtpt/failed/{i}").decode() for i in range(1, store.add("bmtpt/failures", 0) + 1)]
            spoke = {int(said.split()[0]) for said in failed}
            if gone := [self._named(store, rank) for rank in silent if rank not in spoke]:
                return f"for want of {', '.join(gone)}: gone without a word, look there first"
            first, said = failed[0].split(maxsplit=1)
            return "" if place == 1 else f"after {self._named(store, int(first))}, which said {said[:200]!r}"
        except RuntimeError:  # torch's error of a store that does not answer is one, too
            return "" if self._rank == 0 else f"for want of rank 0 on {self._first_node}: gone, look there first"

    def _silent(self, store: torch.distributed.TCPStore) -> list[int]:
        """The other ranks that give no sign of life for some seconds."""
        before = self._counts(store)
        time.sleep(_SILENCE)
        return [r for r, count in enumerate(self._counts(store)) if count == before[r] and r != self._rank]

    def _counts(self, store: torch.distributed.TCPStore) -> list[int]:
        return [store.add(f"bmtpt/pulse/{rank}", 0) for rank in range(self._world)]

    @staticmethod
    def _named(store: torch.distributed.TCPStore, rank: int) -> str:
        return f"rank {rank} on {store.get(f'bmtpt/node/{rank}').decode()}"


def node_name() -> str:
    """This machine's name, and its address as the job's other nodes see it."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing: asks which cable it would take
        return f"{socket.gethostname()} ({probe.getsockname()[0]})"
    return socket.gethostname()
