"""How far something is: a bar on a terminal, plain lines elsewhere. Rank 0 alone is to show it."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

from tqdm import tqdm

from bmtpt_ds.quiet import print_line
from bmtpt_ds.readable import duration

_LEAST_BAR = 4  # columns
_EXACT = 9999  # counts up to it are written out, larger ones in thousands
_BAR_AFTER, _LINE_AFTER, _LINE_EVERY = 3.0, 10.0, 30.0  # seconds; what takes less says nothing


def on_terminal() -> bool:
    return sys.stderr.isatty()


def open_bar(title: str, total: int, *, done: int = 0, shown: bool, leave: bool = True) -> tqdm:
    """A bar of the run's look, which draws nothing unless `shown` and on a terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}",
        unit_scale=total > _EXACT,
        disable=not (shown and on_terminal()),
        dynamic_ncols=True,
        leave=leave,
    )


def show_behind(bar: tqdm, parts: Sequence[str]) -> None:
    """Puts behind a bar those of the parts, most important first, for which the terminal has room."""
    width = 80
    with suppress(OSError, ValueError):  # no terminal after all
        width = os.get_terminal_size(sys.stderr.fileno()).columns or width
    count = len(f"{bar.total}" if bar.total <= _EXACT else "99.9k")
    room = width - 1 - len(f"{bar.desc} || /") - 2 * count - _LEAST_BAR
    kept: list[str] = []
    for part in parts:
        if sum(len(k) + 2 for k in kept) + len(part) + 2 > room:
            break
        kept.append(part)
    bar.set_postfix_str(", ".join(kept), refresh=False)


class Pass:
    """How far a pass over many things is, such as rows that are answered, if it takes more than a few seconds.

    A context manager: what it shows on a terminal is gone afterwards.
    """

    def __init__(self, title: str, total: int, *, shown: bool, unit: Callable[[float], str] = str):
        """
        Args:
            total: how many things.
            shown: whether this rank is the one that shows it.
            unit: how a count of them reads.
        """
        self._title, self._total, self._unit = title, total, unit
        self._shown, self._done = shown, 0
        self._begun = time.monotonic()
        self._next_line = self._begun + _LINE_AFTER
        self._bar: tqdm | None = None

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """That many more are done."""
        self._done += count
        now = time.monotonic()
        if not self._shown or not self._done:
            return
        left = f"{duration((now - self._begun) / self._done * (self._total - self._done))} left"
        if on_terminal():
            self._draw(now, left)
        elif now > self._next_line and self._done < self._total:
            self._next_line = now + _LINE_EVERY
            of = f"{self._unit(self._done)} of {self._unit(self._total)}"
            print_line(f"{self._title} {of}  {left}")

    def _draw(self, now: float, left: str) -> None:
        if self._bar is None and now - self._begun > _BAR_AFTER:
            self._bar = open_bar(self._title, self._total, shown=True, leave=False)
        if self._bar is not None:
            show_behind(self._bar, [left])
            self._bar.update(self._done - self._bar.n)

    def aside(self) -> AbstractContextManager:
        """Inside, the terminal is free for other output."""
        return tqdm.external_write_mode(file=sys.stderr) if self._shown and on_terminal() else nullcontext()
