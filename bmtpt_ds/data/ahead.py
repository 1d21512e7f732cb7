"""What a step needs, made in a thread while the step before it runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `make(step)` one step ahead; a context, which the thread does not outlive.

    `make` must be a function of the step alone. What it raises is raised where its step is taken.
    """

    def __init__(self, make: Callable[[int], T], last: int):
        """
        Args:
            last: the step after which nothing more is made.
        """
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._step, self._coming = 0, None  # the step that is in the making, if one is
        self._coming: Future[T] | None

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> T:
        """What `make` gives for a step; the next one's is begun."""
        coming, was = self._coming, self._step
        self._coming = None
        if coming is None or was != step:
            coming = self._thread.submit(self._make, step)
        made = coming.result()
        if step < self._last:
            self._step, self._coming = step + 1, self._thread.submit(self._make, step + 1)
        return made
