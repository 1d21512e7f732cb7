"""What the report's pictures have in common: panels, colours, legends."""

COLOURS = ("#1f6fb4", "#e08a1e", "#3a9a5b", "#7b4ea3", "#c0392b", "#8a6d3b", "#4fb3bf", "#8a8a8a")


def panels_of(count: int, *, across: int, height: float):
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


def legend_below(figure, panel) -> None:
    """The panel's curves named below the figure, which grows by what they need."""
    handles, labels = panel.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 1 if longest > 44 else 2 if longest > 28 else 3
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(labels) // columns) - 1))
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=columns, handlelength=3, loc="outside lower center")
