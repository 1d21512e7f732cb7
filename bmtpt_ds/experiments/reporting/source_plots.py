"""Pictures of source stages: losses, what SVGD does over the steps, and what it costs."""

from collections.abc import Callable, Sequence
from statistics import fmean

from bmtpt_ds.config.methods import SOURCE_KIND
from bmtpt_ds.experiments.profiling.report import PAPER
from bmtpt_ds.experiments.reporting.figures import COLOURS, legend_below, panels_of
from bmtpt_ds.experiments.reporting.groups import SourceSeeds
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.experiments.reporting.series import Share, distances, metric_lines, svgd_shares

Points = list[tuple]  # of a curve: a step, and what was measured in it
RunCurve = tuple[Run, Points]
MOST = len(COLOURS)  # source stages in a picture
_MOST_POINTS = 2000  # of a curve: no screen shows more
_LOGARITHMIC = 10  # greatest value over the least from which an axis is logarithmic


def losses_figure(sources: Sequence[SourceSeeds]):
    """A panel a source stage: a line a prompt; of several seeds a line a seed, the mean of its prompts, and a band from
    the least to the greatest of them."""
    drawn = _with_curves(sources, _losses)
    if not drawn:
        return None
    figure, panels = panels_of(len(drawn), across=2, height=3.2 if len(drawn) > 1 else 4.2)
    for panel, (name, curves) in zip(panels, drawn, strict=True):
        seeds = len(curves) > 1
        (_draw_seeds if seeds else _draw_prompts)(panel, curves)
        losses = [loss for _, points in curves for _, of_step in points for loss in of_step]
        panel.set(xlabel="source step", ylabel="loss (nats a target token)")
        scale_positive(panel, losses)
        run, points = curves[0]
        count, what = len(points[-1][1]), "particle" if run.method == "bmtpt" else "prompt"
        title = f"{name}, {count} {what}{'s' * (count > 1)}{f', {len(curves)} seeds' * seeds}"
        panel.set_title(title, fontsize=11)
        panel.xaxis.set_major_locator(_whole_steps())
        if 1 < len(panel.get_legend_handles_labels()[0]) <= len(COLOURS):
            panel.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def _with_curves(sources: Sequence[SourceSeeds], curve_of: Callable[[Run], Points]) -> list[tuple[str, list[RunCurve]]]:
    """The names of those that have curves, and their runs with them."""
    found = [(source.name, [(run, curve_of(run)) for run in source.runs]) for source in sources]
    found = [(name, [(run, points) for run, points in curves if len(points) > 1]) for name, curves in found]
    return [(name, curves) for name, curves in found if curves]


def _losses(run: Run) -> Points:
    """Steps and losses of as many prompts as the last line has."""
    lines = metric_lines(run, "losses")
    return _thinned([line for line in lines if len(line[1]) == len(lines[-1][1])])


def _draw_prompts(panel, curves: Sequence[RunCurve]) -> None:
    ((run, points),) = curves
    steps, losses = zip(*points, strict=True)
    prompts, tasks = list(zip(*losses, strict=True)), run.config["source"].get("tasks", [])
    of_tasks = SOURCE_KIND.get(run.method) == "a prompt a task" and len(tasks) == len(prompts)
    for i, of_prompt in enumerate(prompts):
        label = tasks[i] if of_tasks else f"particle {i + 1}"
        panel.plot(steps, of_prompt, color=COLOURS[i % len(COLOURS)], lw=1.1, alpha=0.85, label=label)


def _draw_seeds(panel, curves: Sequence[RunCurve]) -> None:
    for i, (run, points) in enumerate(curves):
        steps, losses = zip(*points, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        panel.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.12, lw=0)
        panel.plot(steps, list(map(fmean, losses)), color=colour, lw=1.1, alpha=0.85, label=f"seed {run.seed}")


def _thinned(points: Points) -> Points:
    return points[:: -(-len(points) // _MOST_POINTS)] if points else []


def scale_positive(panel, drawn: Sequence[float]) -> None:
    """The axis of positive values: from 0, or logarithmic where the small ones would lie flat on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not max(drawn) > _LOGARITHMIC * min(drawn) > 0:
        panel.set_ylim(0, None)
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _whole_steps():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)


def svgd_figure(sources: Sequence[SourceSeeds]):
    """A colour a source stage, a line a seed."""
    drawn = _with_curves(sources, _svgd)
    if not drawn:
        return None
    spreads = {run.path: _thinned(distances(run)) for _, curves in drawn for run, _ in curves}
    figure, (left, right, *below) = panels_of(3 if any(spreads.values()) else 2, across=2, height=3.8)
    for colour, (name, curves) in zip(COLOURS, drawn, strict=False):
        for i, (run, points) in enumerate(curves):
            steps, kernel, drive, repulsion = zip(*points, strict=True)
            left.plot(steps, kernel, color=colour, lw=1.4, label=None if i else name)
            right.plot(steps, [value or None for value in drive], color=colour, lw=1.4)
            right.plot(steps, [value or None for value in repulsion], color=colour, lw=1.4, ls="--")
            for panel in below if spreads[run.path] else ():
                panel.plot(*zip(*spreads[run.path], strict=True), color=colour, lw=1.4)
    left.set(xlabel="source step", ylabel="mean of the kernel matrix, 0 to 1", ylim=(0, 1.05))
    left.set_title("Kernel mean (near 1: particles coincide)", fontsize=11)
    right.set(xlabel="source step", ylabel="norm over all particles", yscale="log")
    right.set_title("Drive (lines) and repulsion (dashed)", fontsize=11)
    for panel in below:
        panel.set(xlabel="source step", ylabel="units of embeddings")
        scale_positive(panel, [apart for points in spreads.values() for _, apart in points])
        panel.set_title("Spread: median distance of two particles", fontsize=11)
    for panel in (left, right, *below):
        panel.xaxis.set_major_locator(_whole_steps())
    legend_below(figure, left)
    return figure


def _svgd(run: Run) -> Points:
    """Steps, kernel mean, norms of drive and repulsion."""
    return _thinned(metric_lines(run, "kernel_mean", "drive_norm", "repulsion_norm"))


def shares_figure(runs: Sequence[Run], profiles: Sequence[dict]):
    shares = svgd_shares(runs, profiles)
    if not shares:
        return None
    figure, (panel,) = panels_of(1, across=1, height=4.2)
    shares.append(Share("t5-base\n(the paper, RTX 3090)", PAPER["svgd"] / PAPER["backward"]))
    heights = [100 * share.ratio for share in shares]
    panel.bar(range(len(shares)), heights, 0.55, color=[COLOURS[0]] * (len(shares) - 1) + ["#9a9a9a"])
    for x, height in enumerate(heights):
        panel.text(x, height, f"{height:.2g}%", ha="center", va="bottom", fontsize=10)
    panel.set(xlim=(-0.7, len(shares) - 0.3), ylim=(0, 1.12 * max(heights)))
    panel.set(ylabel="SVGD step over backward pass, % of its seconds")
    panel.set_xticks(range(len(shares)), [share.label for share in shares], fontsize=9)
    return figure
