"""Pictures of source stages: losses, what SVGD does over the steps, and what it costs."""

from collections.abc import Sequence

from bmtpt_ds.config.methods import SOURCE_KIND
from bmtpt_ds.experiments.profiling.report import PAPER
from bmtpt_ds.experiments.reporting.figures import COLOURS, legend_below, panels_of
from bmtpt_ds.experiments.reporting.groups import SourceSeeds
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.experiments.reporting.series import Share, distances, metric_lines, svgd_shares

MOST = len(COLOURS)  # source stages in a picture
_MOST_POINTS = 2000  # of a curve: no screen shows more
_LOGARITHMIC = 10  # greatest loss over the least from which the axis is logarithmic


def losses_figure(sources: Sequence[SourceSeeds]):
    """A panel a source stage: a line a prompt; of several seeds a line a seed, the mean of its prompts, and a band from
    the least to the greatest of them."""
    drawn = [(source, [run for run in source.runs if len(_losses(run)) > 1]) for source in sources]
    drawn = [(source, runs) for source, runs in drawn if runs]
    if not drawn:
        return None
    figure, panels = panels_of(len(drawn), across=2, height=3.2 if len(drawn) > 1 else 4.2)
    for panel, (source, runs) in zip(panels, drawn, strict=True):
        seeds = len(runs) > 1
        lowest, highest = (_draw_seeds if seeds else _draw_prompts)(panel, runs)
        panel.set(xlabel="source step", ylabel="loss (nats a target token)")
        if highest > _LOGARITHMIC * lowest > 0:
            _logarithmic(panel)
        else:
            panel.set_ylim(0, None)
        count = len(_losses(runs[0])[-1][1])
        what = "particle" if runs[0].method == "bmtpt" else "prompt"
        title = f"{source.name}, {count} {what}{'s' * (count > 1)}{f', {len(runs)} seeds' * seeds}"
        panel.set_title(title, fontsize=11)
        panel.xaxis.set_major_locator(_whole_steps())
        if 1 < len(panel.get_legend_handles_labels()[0]) <= len(COLOURS):
            panel.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def _losses(run: Run) -> list[tuple]:
    """Steps and losses of as many prompts as the last line has."""
    lines = metric_lines(run, "losses")
    return _thinned([line for line in lines if len(line[1]) == len(lines[-1][1])])


def _draw_prompts(panel, runs: Sequence[Run]) -> tuple[float, float]:
    """The least and the greatest loss that were drawn."""
    (run,) = runs
    steps, losses = zip(*_losses(run), strict=True)
    prompts, tasks = list(zip(*losses, strict=True)), run.config["source"].get("tasks", [])
    of_tasks = SOURCE_KIND.get(run.method) == "a prompt a task" and len(tasks) == len(prompts)
    for i, of_prompt in enumerate(prompts):
        label = tasks[i] if of_tasks else f"particle {i + 1}"
        panel.plot(steps, of_prompt, color=COLOURS[i % len(COLOURS)], lw=1.1, alpha=0.85, label=label)
    return min(map(min, prompts)), max(map(max, prompts))


def _draw_seeds(panel, runs: Sequence[Run]) -> tuple[float, float]:
    """The least and the greatest loss that were drawn."""
    bounds = []
    for i, run in enumerate(runs):
        steps, losses = zip(*_losses(run), strict=True)
        means, colour = [sum(of_step) / len(of_step) for of_step in losses], COLOURS[i % len(COLOURS)]
        low, high = list(map(min, losses)), list(map(max, losses))
        panel.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        panel.plot(steps, means, color=colour, lw=1.1, alpha=0.85, label=f"seed {run.seed}")
        bounds += [min(low), max(high)]
    return min(bounds), max(bounds)


def _thinned(points: list[tuple]) -> list[tuple]:
    return points[:: -(-len(points) // _MOST_POINTS)] if points else []


def _logarithmic(panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _whole_steps():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)


def svgd_figure(sources: Sequence[SourceSeeds]):
    """A colour a source stage of particles, a line a seed."""
    drawn = [(source.name, [run for run in source.runs if len(_svgd(run)) > 1]) for source in sources]
    drawn = [(name, runs) for name, runs in drawn if runs][:MOST]
    if not drawn:
        return None
    spread = any(distances(run) for _, runs in drawn for run in runs)
    figure, (left, right, *below) = panels_of(3 if spread else 2, across=2, height=3.8)
    for colour, (name, runs) in zip(COLOURS, drawn, strict=False):
        for run in runs:
            steps, kernel, drive, repulsion = zip(*_svgd(run), strict=True)
            left.plot(steps, kernel, color=colour, lw=1.4, label=name if run is runs[0] else None)
            right.plot(steps, [value or None for value in drive], color=colour, lw=1.4)
            right.plot(steps, [value or None for value in repulsion], color=colour, lw=1.4, ls="--")
            for panel in below if distances(run) else ():
                panel.plot(*zip(*_thinned(distances(run)), strict=True), color=colour, lw=1.4)
    left.set(xlabel="source step", ylabel="mean of the kernel matrix, 0 to 1", ylim=(0, 1.05))
    left.set_title("Kernel mean (near 1: particles coincide)", fontsize=11)
    right.set(xlabel="source step", ylabel="norm over all particles", yscale="log")
    right.set_title("Drive (lines) and repulsion (dashed)", fontsize=11)
    for panel in below:
        panel.set(xlabel="source step", ylabel="units of embeddings", ylim=(0, None))
        panel.set_title("Spread: median distance of two particles", fontsize=11)
    for panel in (left, right, *below):
        panel.xaxis.set_major_locator(_whole_steps())
    legend_below(figure, left)
    return figure


def _svgd(run: Run) -> list[tuple]:
    """Steps, kernel mean, norms of drive and repulsion; none of a lone particle, which has no others."""
    if run.prompts == 1:
        return []
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
