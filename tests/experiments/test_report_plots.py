"""What the pictures of `bmtpt report` show."""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bmtpt_ds.experiments.reporting.groups import group_runs, group_sources
from bmtpt_ds.experiments.reporting.plots import plot_all
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.tables import comparisons
from tests.experiments.made_runs import adapt_run, source_run, zero_shot_run


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch) -> Callable[[Path], dict[str, Figure]]:
    def draw(folder: Path) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.setdefault(path.name, figure))
        runs = find_runs([folder]).runs
        groups, _ = group_runs(runs)
        plot_all(tmp_path, groups, comparisons(groups), [run for run in runs if run.stage == "source"], [])
        return figures

    return draw


def titles(figure: Figure) -> list[str]:
    return [panel.get_title() for panel in figure.axes if panel.get_visible()]


def names(panel) -> list[str]:
    return panel.get_legend_handles_labels()[1]


# --- source stages ---------------------------------------------------------------------------------------------------


def named(name: str, **settings: object) -> dict[str, dict[str, object]]:
    return {"settings": {"run.name": name} | {key.replace("__", "."): value for key, value in settings.items()}}


def test_seeds_of_a_source_stage_are_one_group(tmp_path: Path) -> None:
    for seed in (0, 1):
        source_run(tmp_path / f"named/source-{seed}", seed=seed, **named("ours", target__steps=100 + seed))
        source_run(tmp_path / f"long/source-{seed}", seed=seed, steps=4000)
    source_run(tmp_path / "single/source", steps=500)
    source_run(tmp_path / "tuned", method="spot")
    groups = group_sources(find_runs([tmp_path]).runs)
    found = {name: [run.seed for run in runs] for name, runs in groups}
    assert found == {
        "long/source-0 and 1 more": [0, 1],
        "ours": [0, 1],
        "single/source": [0],
        f"{tmp_path.name}/tuned": [0],
    }


def test_a_name_of_two_recipes_names_neither(tmp_path: Path) -> None:
    for folder, steps in (("a", 100), ("b", 200)):
        source_run(tmp_path / folder, steps=steps, **named("ours"))
    assert [name for name, _ in group_sources(find_runs([tmp_path]).runs)] == ["a", "b"]


def test_losses_of_one_run_are_its_prompts_and_of_several_the_seeds(tmp_path: Path, drawn) -> None:
    for seed in (0, 1, 2):
        source_run(tmp_path / f"source-{seed}", seed=seed, steps=300, **named("ours"))
    source_run(tmp_path / "spot", method="spot", particles=2, steps=300)
    source_run(tmp_path / "one", method="vanilla_transfer", particles=1, steps=300)
    figure = drawn(tmp_path)["losses.png"]
    assert titles(figure) == ["one, 1 prompt", "ours, 5 particles, 3 seeds", "spot, 2 prompts"]
    one, ours, spot, _ = figure.axes
    assert names(ours) == ["seed 0", "seed 1", "seed 2"]
    assert names(spot) == ["sst2", "cola"]
    assert one.get_legend() is None
    (run,) = (run for run in find_runs([tmp_path]).runs if run.path.name == "source-1")
    _, middle, _ = ours.get_lines()
    assert list(middle.get_ydata()) == pytest.approx([line["loss"] for line in run.lines])


def test_losses_that_fall_far_are_seen_on_a_logarithmic_axis(tmp_path: Path, drawn) -> None:
    source_run(tmp_path / "little", steps=100)
    source_run(tmp_path / "far", steps=4000)
    file = tmp_path / "far/metrics.jsonl"
    file.write_text(file.read_text().replace('"losses": [1.', '"losses": [0.1'))
    far, little = drawn(tmp_path)["losses.png"].axes
    assert (far.get_yscale(), little.get_yscale()) == ("log", "linear")
    assert little.get_ylim()[0] == 0


def test_svgd_has_a_colour_a_recipe_and_a_line_a_seed(tmp_path: Path, drawn) -> None:
    for name, steps in (("short", 300), ("long", 600)):
        for seed in (0, 1):
            source_run(tmp_path / f"{name}-{seed}", seed=seed, steps=steps, **named(name))
    source_run(tmp_path / "alone", particles=1, steps=300)  # has nothing to show
    kernel, norms, spread, _ = drawn(tmp_path)["svgd.png"].axes
    assert names(kernel) == ["long", "short"]
    assert [len(panel.get_lines()) for panel in (kernel, norms, spread)] == [4, 8, 4]
    assert [line.get_xdata()[-1] for line in kernel.get_lines()] == [600, 600, 300, 300]
    assert len({line.get_color() for line in kernel.get_lines()}) == 2


def test_the_first_stages_are_shown_and_how_many_there_are_is_said(tmp_path: Path) -> None:
    for i in range(10):
        source_run(tmp_path / f"runs/a{i}", steps=100 + 10 * i)
        source_run(tmp_path / f"runs/b{i}", method="spot", steps=100 + 10 * i)  # before none of the above in svgd.png
    drawn = plot_all(tmp_path, [], [], find_runs([tmp_path / "runs"]).runs, [])
    assert drawn["losses.png"].endswith("(the first 8 of 20 source stages)")
    assert drawn["svgd.png"].endswith("(the first 8 of 10 source stages)")


# --- differences -----------------------------------------------------------------------------------------------------


def test_differences_have_a_panel_a_baseline_and_a_colour_a_number_of_shots(tmp_path: Path, drawn) -> None:
    for task in ("rte", "mrpc"):
        for method, gain in (("bmtpt", 6.0), ("vanilla_transfer", 4.0), ("prompt_tuning", 0.0)):
            for shots in (4, 16):
                of_run = {"method": method, "shots": shots, "particles": "none" if not gain else "runs/source"}
                score = 50.0 + shots + gain + (task == "rte" and gain / 2)
                adapt_run(tmp_path / f"{task}-{method}-{shots}", {task: score}, **of_run)
    for method, score in (("bmtpt", 41.0), ("vanilla_transfer", 44.0)):
        zero_shot_run(tmp_path / method, {"rte": score, "mrpc": score}, method=method)
    figure = drawn(tmp_path)["differences.png"]
    assert titles(figure) == ["against prompt_tuning", "against vanilla_transfer"]
    tuning, transfer = figure.axes
    assert [label.get_text() for label in tuning.get_yticklabels()] == ["bmtpt", "vanilla_transfer"]
    points = {line.get_label(): line.get_xydata().tolist() for line in transfer.get_lines() if line.get_marker() == "o"}
    assert points == {
        f"{shots} shots": [[gain, pytest.approx(place)]]
        for shots, gain, place in ((0, -3.0, -0.8 / 3), (4, 2.5, 0.0), (16, 2.5, 0.8 / 3))
    }
    ends = [line.get_xdata() for line in transfer.get_lines() if line.get_marker() != "o"][1:]
    assert [list(of_one) for of_one in ends] == [[-3, -3], [2, 3], [2, 3]]


def test_single_pairs_have_no_picture(tmp_path: Path, drawn) -> None:
    for particles, score in (("runs/source", 60.0), ("none", 50.0)):
        adapt_run(tmp_path / particles, {"rte": score}, particles=particles)
    assert "differences.png" not in drawn(tmp_path)
