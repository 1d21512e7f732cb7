"""Numbers as people read them."""

from collections.abc import Sequence
from statistics import fmean, stdev


def duration(seconds: float) -> str:
    """A span as people say it: `42 s`, `3 min`, `5 h 12 min`, `3 days 4 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = round(minutes / 60)
    return f"{hours // 24} days {hours % 24} h" if hours % 24 else f"{hours // 24} days"


def short_time(seconds: float) -> str:
    """A moment in three digits: `1.24 s`, `412 ms`, `3.1 us`; 0 without a unit."""
    if not seconds:
        return "0"
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if seconds * f >= 0.9995), ("us", 1e6))
    return f"{seconds * factor:.3g} {unit}"


def readable_bytes(count: int) -> str:
    """`307 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; the mean alone of a single value."""
    return plus_minus(fmean(values), stdev(values) if len(values) > 1 else None)


def plus_minus(mean: float, std: float | None) -> str:
    """`71.2 ± 3.4`, in points."""
    return f"{mean:.1f}" + (f" ± {std:.1f}" if std is not None else "")
