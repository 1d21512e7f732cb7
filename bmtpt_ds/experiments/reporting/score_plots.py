"""Pictures of scores: against shots and sizes of models, and as differences from baselines."""

from collections.abc import Sequence

from bmtpt_ds.experiments.reporting.figures import COLOURS, legend_below, panels_of
from bmtpt_ds.experiments.reporting.groups import Group, in_order, shots_text
from bmtpt_ds.experiments.reporting.series import Curve, paper_size_curve, shot_curves, size_curves
from bmtpt_ds.experiments.reporting.statistics import LEVEL
from bmtpt_ds.experiments.reporting.tables import Comparison

_LONGEST = 70  # characters of a curve's name
_MOST_BASELINES = 3  # panels


def shots_figure(groups: Sequence[Group]):
    curves = shot_curves(groups)
    if not curves:
        return None
    places = sorted({place for curve in curves for place in curve.places})
    figure, (panel,) = panels_of(1, across=1, height=4.8)
    _draw_curves(panel, curves)
    panel.set_xlabel("labelled rows of a task (log scale)")
    if places[0] == 0:  # has no logarithm: linear up to the fewest rows
        panel.set_xscale("symlog", linthresh=places[1], linscale=0.4)
    else:
        panel.set_xscale("log")
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.set_xticks([], minor=True)
    legend_below(figure, panel)
    return figure


def sizes_figure(groups: Sequence[Group]):
    curves = size_curves(groups)
    if not curves:
        return None
    figure, (panel,) = panels_of(1, across=1, height=4.8)
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
    legend_below(figure, panel)
    return figure


def differences_figure(comparisons: Sequence[Comparison]):
    """A panel a baseline: points and intervals of all others, a colour a number of shots."""
    drawn = [c for c in comparisons if c.difference.interval is not None]
    if not drawn:
        return None
    several = len({c.group.model for c in drawn}) > 1
    shots = in_order(c.group.shots for c in drawn)
    # in the order of the most shots: at 0 some methods have none
    drawn.sort(key=lambda c: shots.index(c.group.shots), reverse=True)
    baselines = list(dict.fromkeys(c.baseline.label for c in drawn))[:_MOST_BASELINES]
    names = list(dict.fromkeys(_of_model(c.group, several) for c in drawn))
    height = 1.6 + 0.16 * len(names) * (1 + len(shots))
    figure, panels = panels_of(len(baselines), across=_MOST_BASELINES, height=height)
    for panel, baseline in zip(panels, baselines, strict=True):
        panel.axvline(0, color="#9a9a9a", lw=1)
        for k, count in enumerate(shots):
            here = [c for c in drawn if (c.baseline.label, c.group.shots) == (baseline, count)]
            places = [names.index(_of_model(c.group, several)) + 0.8 * (k + 0.5) / len(shots) - 0.4 for c in here]
            _draw_intervals(panel, here, places, color=COLOURS[k % len(COLOURS)], label=shots_text(count))
        panel.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"points ({LEVEL:.0%} interval)")
        panel.set_title(f"against {baseline}", fontsize=11)
        panel.set_yticks(range(len(names)), names if panel is panels[0] else [])
    legend_below(figure, panels[0])
    return figure


def _draw_intervals(panel, comparisons: Sequence[Comparison], places: Sequence[float], **look: str) -> None:
    means = [c.difference.mean for c in comparisons]
    panel.plot(means, places, "o", ms=4, **look)
    for comparison, place in zip(comparisons, places, strict=True):
        panel.plot(comparison.difference.interval, [place, place], lw=1.2, color=look["color"])


def _of_model(group: Group, several: bool) -> str:
    return _shortened(f"{group.label}, {group.model}" if several else group.label)


def _shortened(name: str) -> str:
    """Too long a variant loses its middle, the tables have it whole."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 20]}...{name[-17:]}"


def _draw_curves(panel, curves: Sequence[Curve]) -> None:
    """Means as lines, ± a standard deviation as a band."""
    for k, curve in enumerate(curves):
        colour, style = COLOURS[k % len(COLOURS)], "-" if k < len(COLOURS) else "--"
        means = [cell.mean for cell in curve.cells]
        spread = [cell.std or 0.0 for cell in curve.cells]
        panel.plot(curve.places, means, "o", ls=style, color=colour, lw=1.7, ms=5, label=_label(curve))
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        panel.fill_between(curve.places, low, high, color=colour, alpha=0.15, lw=0)
    panel.set_ylabel("mean score, % (band: ± std over seeds)")


def _label(curve: Curve) -> str:
    """What the legend says."""
    also = f"; differing {', '.join(curve.differing[:3])}{', ...' * (len(curve.differing) > 3)}" * bool(curve.differing)
    return f"{_shortened(curve.label)} ({len(curve.tasks)} task{'s' * (len(curve.tasks) > 1)}{also})"
