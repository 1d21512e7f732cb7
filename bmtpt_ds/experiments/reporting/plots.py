"""The report's pictures (PNG), each only where there is something to show."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bmtpt_ds.experiments.profiling.report import PAPER
from bmtpt_ds.experiments.reporting.groups import Group
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.experiments.reporting.series import (
    Curve,
    Share,
    distances,
    metric_lines,
    paper_size_curve,
    shot_curves,
    size_curves,
    svgd_shares,
)

_COLOURS = ("#1f6fb4", "#e08a1e", "#3a9a5b", "#7b4ea3", "#c0392b", "#8a6d3b", "#4fb3bf", "#8a8a8a")
MOST_RUNS = 6  # source stages in a picture
_DPI = 110
_LONGEST = 70  # characters of a curve's name
_MOST_POINTS = 2000  # of a curve: no screen shows more


def plot_all(out: Path, groups: Sequence[Group], sources: Sequence[Run], profiles: Sequence[dict]) -> dict[str, str]:
    """Draws what there is data for into the folder `out`; file names and what the pictures show.

    Args:
        sources: source stages; the first MOST_RUNS of them are shown.
        profiles: of `bmtpt profile --json`, a model each.
    """
    import matplotlib

    matplotlib.use("Agg")
    shown = sources[:MOST_RUNS]
    rest = f" (the first {MOST_RUNS} of {len(sources)} source stages)" if len(sources) > MOST_RUNS else ""
    pictures: list[tuple[str, str, Callable[[], Any]]] = [
        ("losses.png", f"Losses of the particles over the steps of the source stage{rest}", lambda: _losses(shown)),
        (
            "svgd.png",
            f"Kernel mean, drive, repulsion and spread of the particles over the steps{rest}",
            lambda: _svgd(shown),
        ),
        ("shots.png", "Scores against the number of labelled rows", lambda: _shots(groups)),
        ("scaling.png", "Scores against the size of the model", lambda: _sizes(groups)),
        ("svgd_share.png", "What SVGD costs beside the backward pass", lambda: _shares(sources, profiles)),
    ]
    drawn = {}
    for name, title, draw in pictures:
        figure = draw()
        if figure is not None:
            figure.savefig(out / name, dpi=_DPI)
            drawn[name] = title
            _close(figure)
    return drawn


def _close(figure) -> None:
    from matplotlib import pyplot as plt

    plt.close(figure)


def _panels(count: int, *, across: int, height: float):
    """A figure 8 inches wide and its panels, without the frames' upper and right lines."""
    from matplotlib import pyplot as plt

    across = min(across, count)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(8, height * down), layout="constrained", squeeze=False)
    panels = list(axes.flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _thinned(points: list[tuple]) -> list[tuple]:
    return points[:: -(-len(points) // _MOST_POINTS)] if points else []


def _names(runs: Sequence[Run]) -> list[str]:
    """Short names of runs: the last part of their paths that tells them apart."""
    for depth in range(1, 6):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names


def _of_particles(run: Run) -> list[tuple]:
    """Steps and losses of as many particles as the last line has."""
    lines = metric_lines(run, "losses")
    return [line for line in lines if len(line[1]) == len(lines[-1][1])]


def _losses(runs: Sequence[Run]):
    curves = [(name, _thinned(_of_particles(run))) for name, run in zip(_names(runs), runs, strict=True)]
    curves = [(name, points) for name, points in curves if len(points) > 1]
    if not curves:
        return None
    figure, panels = _panels(len(curves), across=2, height=3.6 if len(curves) > 1 else 4.2)
    for panel, (name, points) in zip(panels, curves, strict=True):
        steps = [step for step, _ in points]
        particles = list(zip(*(losses for _, losses in points), strict=True))
        for i, losses in enumerate(particles):
            label = f"particle {i + 1}" if len(particles) <= len(_COLOURS) else None
            panel.plot(steps, losses, color=_COLOURS[i % len(_COLOURS)], lw=1.1, alpha=0.85, label=label)
        panel.set(xlabel="source step", ylabel="loss (nats a target token)", ylim=(0, None))
        panel.set_title(f"{name}, {len(particles)} particle{'s' * (len(particles) > 1)}", fontsize=11)
        panel.xaxis.set_major_locator(_whole_steps())
        if 1 < len(particles) <= len(_COLOURS):
            panel.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def _whole_steps():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)


def _svgd(runs: Sequence[Run]):
    keys = ("kernel_mean", "drive_norm", "repulsion_norm")
    curves = [(name, _thinned(metric_lines(run, *keys))) for name, run in zip(_names(runs), runs, strict=True)]
    curves = [(name, points) for name, points in curves if len(points) > 1]
    if not curves:
        return None
    spreads = {name: _thinned(distances(run)) for name, run in zip(_names(runs), runs, strict=True)}
    figure, (left, right, *below) = _panels(3 if any(spreads.values()) else 2, across=2, height=3.8)
    for colour, (name, points) in zip(_COLOURS, curves, strict=False):
        steps, kernel, drive, repulsion = zip(*points, strict=True)
        left.plot(steps, kernel, color=colour, lw=1.4, label=name)
        right.plot(steps, [value or None for value in drive], color=colour, lw=1.4)
        right.plot(steps, [value or None for value in repulsion], color=colour, lw=1.4, ls="--")
    left.set(xlabel="source step", ylabel="mean of the kernel matrix, 0 to 1", ylim=(0, 1.05))
    left.set_title("Kernel mean (near 1: particles coincide)", fontsize=11)
    right.set(xlabel="source step", ylabel="norm over all particles", yscale="log")
    right.set_title("Drive (lines) and repulsion (dashed)", fontsize=11)
    for panel in below:
        for colour, (name, _) in zip(_COLOURS, curves, strict=False):
            if spreads[name]:
                panel.plot(*zip(*spreads[name], strict=True), color=colour, lw=1.4)
        panel.set(xlabel="source step", ylabel="units of embeddings", ylim=(0, None))
        panel.set_title("Spread: median distance of two particles", fontsize=11)
    for panel in (left, right, *below):
        panel.xaxis.set_major_locator(_whole_steps())
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    return figure


def _shots(groups: Sequence[Group]):
    curves = shot_curves(groups)
    if not curves:
        return None
    places = sorted({place for curve in curves for place in curve.places})
    figure, (panel,) = _panels(1, across=1, height=4.8)
    _draw_curves(panel, curves)
    panel.set_xlabel("labelled rows of a task (log scale)")
    if places[0] == 0:  # has no logarithm: linear up to the fewest rows
        panel.set_xscale("symlog", linthresh=places[1], linscale=0.4)
    else:
        panel.set_xscale("log")
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.set_xticks([], minor=True)
    _legend_below(figure, panel)
    return figure


def _sizes(groups: Sequence[Group]):
    curves = size_curves(groups)
    if not curves:
        return None
    figure, (panel,) = _panels(1, across=1, height=4.8)
    _draw_curves(panel, curves)
    whole = next((curve for curve in curves if curve.label in ("bmtpt, all rows", "bmtpt, all rows, t5")), None)
    paper = paper_size_curve(whole.tasks) if whole else None
    if paper:
        panel.plot(
            paper.places, [c.mean for c in paper.cells], "s:", color="#555555", lw=1.4, ms=5, label=_label(paper)
        )
    panel.set(xscale="log", xlabel="parameters of the model, millions (log scale)")
    places = sorted({place for curve in [*curves, *([paper] if paper else [])] for place in curve.places})
    panel.set_xticks(places, [f"{place / 1e6:,.0f}" for place in places])
    panel.set_xticks([], minor=True)
    _legend_below(figure, panel)
    return figure


def _draw_curves(panel, curves: Sequence[Curve]) -> None:
    """Means as lines, ± a standard deviation as a band."""
    for k, curve in enumerate(curves):
        colour, style = _COLOURS[k % len(_COLOURS)], "-" if k < len(_COLOURS) else "--"
        means = [cell.mean for cell in curve.cells]
        spread = [cell.std or 0.0 for cell in curve.cells]
        panel.plot(curve.places, means, "o", ls=style, color=colour, lw=1.7, ms=5, label=_label(curve))
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        panel.fill_between(curve.places, low, high, color=colour, alpha=0.15, lw=0)
    panel.set_ylabel("mean score, % (band: ± std over seeds)")


def _label(curve: Curve) -> str:
    """What the legend says; too long a variant loses its middle, the tables have it whole."""
    name = curve.label if len(curve.label) <= _LONGEST else f"{curve.label[: _LONGEST - 20]}...{curve.label[-17:]}"
    also = f"; differing {', '.join(curve.differing[:3])}{', ...' * (len(curve.differing) > 3)}" * bool(curve.differing)
    return f"{name} ({len(curve.tasks)} task{'s' * (len(curve.tasks) > 1)}{also})"


def _legend_below(figure, panel) -> None:
    handles, labels = panel.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 44 else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(labels) // columns) - 1))
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=columns, handlelength=3, loc="outside lower center")


def _shares(runs: Sequence[Run], profiles: Sequence[dict]):
    shares = svgd_shares(runs, profiles)
    if not shares:
        return None
    figure, (panel,) = _panels(1, across=1, height=4.2)
    shares.append(Share("t5-base\n(the paper, RTX 3090)", PAPER["svgd"] / PAPER["backward"]))
    heights = [100 * share.ratio for share in shares]
    panel.bar(range(len(shares)), heights, 0.55, color=[_COLOURS[0]] * (len(shares) - 1) + ["#9a9a9a"])
    for x, height in enumerate(heights):
        panel.text(x, height, f"{height:.2g}%", ha="center", va="bottom", fontsize=10)
    panel.set(xlim=(-0.7, len(shares) - 0.3), ylim=(0, 1.12 * max(heights)))
    panel.set(ylabel="SVGD step over backward pass, % of its seconds")
    panel.set_xticks(range(len(shares)), [share.label for share in shares], fontsize=9)
    return figure
