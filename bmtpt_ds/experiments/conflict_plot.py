"""The picture of conflict.py: what three ways to a starting point cost, and how wide the particles spread."""

from collections.abc import Mapping
from pathlib import Path

_BLUE, _ORANGE, _DARK = "#1f6fb4", "#e08a1e", "#3a3a3a"
# label, colour, line, marker, its size: joint and posterior coincide, so a dot lies in an open square
_WAYS = {
    "averaging": ("average of separately trained prompts", _DARK, "-", "^", 8),
    "best_weights": ("the same, best weights for the sources", _DARK, ":", "v", 8),
    "joint": ("one prompt trained on all tasks", _ORANGE, "-", "s", 12),
    "posterior": ("SVGD, mean of the particles", _BLUE, "--", "o", 6),
}
_SPREADS = {  # damping, particles -> colour, line, marker
    ("none", 10): ("#8fbfe6", "-", "v"),
    ("paper", 10): (_BLUE, "-", "o"),
    ("matched", 10): ("#0b2f52", "-", "s"),
    ("matched", 100): ("#0b2f52", "--", "D"),
}


def plot_conflict(file: Path, found: Mapping) -> None:
    """Draws conflict.py's `measure()` into `file` (PNG): lines are closed forms, marks were trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sweeps = found["sweeps"]
    with plt.rc_context({"font.size": 13, "axes.titlesize": 14}):
        figure, panels = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
        (source, unsure), (sure, widths) = panels
        _draw_sweep(source, sweeps["unsure"], "source_excess")
        _draw_sweep(unsure, sweeps["unsure"], "target_loss")
        _draw_sweep(sure, sweeps["sure"], "target_loss")
        _draw_widths(widths, found["spreads"])
        source.set(title="Source tasks; the 4th contradicts\nwhere it is unsure", ylabel="loss above its minimum, nats")
        unsure.set(title="Unseen target task; the 4th contradicts\nwhere it is unsure", ylabel="loss, nats")
        sure.set(title="Unseen target task; the 4th contradicts\nwhere it is sure", ylabel="loss, nats")
        handles = source.get_legend_handles_labels()
        figure.legend(
            *handles, loc="outside upper center", ncols=2, frameon=False, title="lines: closed forms; marks: trained"
        )
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=100)
        plt.close(figure)


def _draw_sweep(axes, by_distance, quantity) -> None:
    distances = [float(distance) for distance in by_distance]
    for way, (label, colour, line, marker, size) in _WAYS.items():
        exact, trained = ([at[kind][way][quantity] for at in by_distance.values()] for kind in ("exact", "trained"))
        face = "none" if way == "joint" else colour
        axes.plot(distances, exact, line, color=colour, lw=2)
        axes.plot(distances, trained, marker, ms=size, mew=2, color=colour, mfc=face)
        axes.plot([], [], line, marker=marker, ms=size, mew=2, color=colour, mfc=face, lw=2, label=label)
    axes.set(xlabel="contradiction (widths of the 4th's posterior)", ylim=(-0.02 * axes.get_ylim()[1], None))
    axes.set_xticks(distances)


def _draw_widths(axes, spreads) -> None:
    eighths = range(1, 9)
    axes.plot(eighths, spreads[0]["posterior"], color="black", lw=4, alpha=0.35, label="the posterior itself")
    for row in spreads:
        colour, line, marker = _SPREADS[row["damping"], row["particles"]]
        label = f"{row['damping']}, M = {row['particles']}: {100 * row['kept']:.0f}%"
        axes.plot(eighths, row["widths"], line, marker=marker, ms=6, lw=1.8, color=colour, label=label)
    axes.set(title="How wide the particles lie (damping,\nM: total variance over the posterior's)", ylim=(-0.02, None))
    axes.set(xlabel="directions, an eighth each, widest first", ylabel="standard deviation")
    axes.set_xticks(eighths)
    axes.legend(frameon=False, fontsize=12)
