"""The report's pictures (PNG), each only where there is something to show."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bmtpt_ds.config.methods import SOURCE_KIND
from bmtpt_ds.experiments.reporting.groups import Group, SourceSeeds, group_sources
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.experiments.reporting.score_plots import differences_figure, shots_figure, sizes_figure
from bmtpt_ds.experiments.reporting.source_plots import MOST, losses_figure, shares_figure, svgd_figure
from bmtpt_ds.experiments.reporting.tables import Comparison

_DPI = 110


def plot_all(
    out: Path,
    groups: Sequence[Group],
    compared: Sequence[Comparison],
    sources: Sequence[Run],
    profiles: Sequence[dict],
) -> dict[str, str]:
    """Draws what there is data for into the folder `out`; file names and what the pictures show.

    Args:
        sources: source stages; the first of them are shown, with all their seeds.
        profiles: of `bmtpt profile --json`, a model each.
    """
    import matplotlib

    matplotlib.use("Agg")
    stages = group_sources(sources)
    of_particles = [stage for stage in stages if _has_particles(stage.runs[0])]
    pictures: list[tuple[str, str, Callable[[], Any]]] = [
        (
            "losses.png",
            f"Losses over the steps of the source stage{_rest(stages)}",
            lambda: losses_figure(stages[:MOST]),
        ),
        (
            "svgd.png",
            f"Kernel mean, drive, repulsion and spread of the particles over the steps{_rest(of_particles)}",
            lambda: svgd_figure(of_particles[:MOST]),
        ),
        ("shots.png", "Scores against the number of labelled rows", lambda: shots_figure(groups)),
        ("differences.png", "Paired differences and their intervals", lambda: differences_figure(compared)),
        ("scaling.png", "Scores against the size of the model", lambda: sizes_figure(groups)),
        ("svgd_share.png", "What SVGD costs beside the backward pass", lambda: shares_figure(sources, profiles)),
    ]
    drawn = {}
    for name, title, draw in pictures:
        figure = draw()
        if figure is not None:
            figure.savefig(out / name, dpi=_DPI)
            drawn[name] = title
            _close(figure)
    return drawn


def _has_particles(run: Run) -> bool:
    """More than one: a lone particle has no kernel and no repulsion."""
    return SOURCE_KIND.get(run.method) == "particles" and run.prompts != 1


def _rest(stages: Sequence[SourceSeeds]) -> str:
    return f" (the first {MOST} of {len(stages)} source stages)" if len(stages) > MOST else ""


def _close(figure) -> None:
    from matplotlib import pyplot as plt

    plt.close(figure)
