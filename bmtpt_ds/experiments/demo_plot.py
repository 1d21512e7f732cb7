"""The demo's picture: how the particles learn, and what it brings on tasks that they have not seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

_COLOURS = {"bmtpt": "#1f6fb4", "single": "#e08a1e", "scratch": "#8a8a8a"}


def plot_demo(
    file: Path,
    losses: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    *,
    shots: int,
) -> None:
    """Draws the picture into `file` (PNG).

    Args:
        losses: of the source stages by method: steps, and at each of them the loss of each particle.
        scores: method -> target task, or their mean -> accuracy (0 to 100) of each seed.
        titles: of the methods.
        shots: labelled rows of a target task.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1.25), layout="constrained")
    _draw_losses(left, losses, titles)
    _draw_scores(right, scores, titles)
    right.set_title(f"Unseen tasks, {shots} labelled rows each")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_losses(axes, losses, titles) -> None:
    for method, (steps, rows) in losses.items():
        for i, particle in enumerate(zip(*rows, strict=True)):
            label = titles[method] if i == 0 else None
            axes.plot(steps, particle, color=_COLOURS[method], lw=1.3, alpha=0.9, label=label)
    axes.set(xlabel="source step", ylabel="loss of each particle", ylim=(0, None), title="Learning from source tasks")
    axes.legend(frameon=False, fontsize=9)


def _draw_scores(axes, scores, titles) -> None:
    for k, (method, by_task) in enumerate(scores.items()):
        places = [group + (k - 1) * 0.27 for group in range(len(by_task))]
        heights, spreads = ([statistic(of_seeds) for of_seeds in by_task.values()] for statistic in (mean, stdev))
        axes.bar(places, heights, 0.25, yerr=spreads, capsize=3, color=_COLOURS[method], label=titles[method])
        for place, of_seeds in zip(places, by_task.values(), strict=True):
            axes.plot([place] * len(of_seeds), of_seeds, "o", ms=3, color="black", alpha=0.5)
    axes.axhline(50, color="black", lw=0.8, ls=":", label="guessing")
    axes.set(ylim=(0, 128), ylabel="test accuracy, % (points: seeds)")
    axes.set_xticks(range(len(by_task)), by_task)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", columnspacing=1, handlelength=1.5)
