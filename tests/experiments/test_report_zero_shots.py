"""Scores of a source stage's prompt without adaptation are rows of 0 shots in a report."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bmtpt_ds.cli import main
from bmtpt_ds.experiments.reporting.groups import Group, group_runs
from bmtpt_ds.experiments.reporting.plots import plot_all
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.series import shot_curves
from bmtpt_ds.experiments.reporting.tables import comparisons, sections
from tests.experiments.made_runs import adapt_run, source_run, zero_shot_run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two seeds of two methods: their source stages, adaptations to 4 shots, scores without any. An adaptation differs
    from the defaults in its target stage."""
    settings = {"target.steps": 100, "target.multi": True}
    for seed in (0, 1):
        for method, score in (("bmtpt", 40.0), ("vanilla_transfer", 30.0)):
            name, source = f"{method}-{seed}", tmp_path / f"runs/source-{method}-{seed}"
            zero_shot_run(source, {"rte": score + seed}, method=method, seed=seed, shots=None)
            about = {"method": method, "seed": seed, "shots": 4, "particles": str(source), "settings": settings}
            adapt_run(tmp_path / "runs" / name, {"rte": score + 20 + seed}, **about)
    return tmp_path / "runs"


def groups_in(folder: Path) -> list[Group]:
    groups, lines = group_runs(find_runs([folder]).runs)
    assert not lines
    return groups


def labels_in(folder: Path) -> dict[str, int]:
    """Of the groups of 0 shots the number of runs in each."""
    return {group.label: len(group.runs) for group in groups_in(folder) if group.shots == 0}


def test_they_are_rows_of_the_tables(made: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["report", str(made), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| ours +\| bmtpt +\| t5-base \| +0 \| +2 \| +40\.5 ± 0\.7 \| +100 / 0 \|", said)
    assert re.search(r"\| bmtpt +\| vanilla_transfer \| t5-base \| +0 \| +2 \| +\+10\.0 \|", said)
    assert "finished: 4 adaptations, 4 source stages (4 scored at 0 shots); 0 unfinished, 0 damaged" in said
    lines = [line for line in csv.DictReader((out / "report.csv").open()) if line["from"] == "ours"]
    assert {(line["method"], line["shots"]): float(line["mean"]) for line in lines} == {
        ("bmtpt", "0"): 40.5,
        ("vanilla_transfer", "0"): 30.5,
        ("bmtpt", "4"): 60.5,
        ("vanilla_transfer", "4"): 50.5,
    }
    assert [line["most_rows_target"] for line in lines if line["shots"] == "0"] == ["0", "0"]


def test_a_source_stage_counts_once(made: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", str(made), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.partition("## Source stages")[2]
    assert len(re.findall(r"source-bmtpt-0 ", table)) == 1


@pytest.mark.parametrize("shots", [None, 0, 16])
def test_whatever_the_file_says_it_is_0_shots(tmp_path: Path, shots: int | None) -> None:
    zero_shot_run(tmp_path / "source", {"rte": 40.0}, shots=shots)
    (group,) = groups_in(tmp_path)
    assert group.shots == 0


def test_settings_of_the_target_stage_are_no_variants(tmp_path: Path) -> None:
    for seed, rate in enumerate((0.1, 0.3)):
        settings = {"target.lr_full": rate, "target.prior": "none", "target.multi": bool(seed)}
        zero_shot_run(tmp_path / f"{seed}", {"rte": 40.0}, seed=seed, settings=settings)
    assert labels_in(tmp_path) == {"bmtpt": 2}


def test_settings_of_the_source_stage_are_variants(tmp_path: Path) -> None:
    for seed in (0, 1):
        zero_shot_run(tmp_path / f"five-{seed}", {"rte": 40.0}, seed=seed)
        zero_shot_run(tmp_path / f"ten-{seed}", {"rte": 40.0}, seed=seed, particles=10)
    assert labels_in(tmp_path) == {"bmtpt": 2, "bmtpt/source.particles=10": 2}


def test_source_runs_that_differ_in_nothing_known_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in "ab":
        zero_shot_run(tmp_path / name, {"rte": 40.0})
    assert labels_in(tmp_path) == {f"bmtpt/particles={tmp_path / name}": 1 for name in "ab"}


def test_a_source_run_without_such_scores_is_no_row(tmp_path: Path) -> None:
    source_run(tmp_path / "source", steps=10)
    shutil.copy(adapt_run(tmp_path / "adapt", {"rte": 60.0}) / "results.json", tmp_path / "adapt" / "zero_shot.json")
    assert [group.shots for group in groups_in(tmp_path)] == [16]  # and no adaptation has any


def test_prompt_tuning_is_no_baseline_of_theirs(made: Path) -> None:
    for seed in (0, 1):
        adapt_run(made / f"tuned-{seed}", {"rte": 50.0}, method="prompt_tuning", shots=4, seed=seed, particles="none")
    found = [(c.group.label, c.baseline.label) for c in comparisons(groups_in(made)) if c.group.shots == 0]
    assert found == [("bmtpt", "vanilla_transfer")]


def test_a_task_that_the_source_stage_had_is_said_to_be_one(tmp_path: Path) -> None:
    zero_shot_run(tmp_path / "source", {"rte": 40.0, "sst2": 90.0})
    notes = [note for section in sections(groups_in(tmp_path)) for note in section.notes]
    assert [note for note in notes if "0 shots" in note] == [
        "sst2: trained on in the source stage of a row of 0 shots, not unseen tasks."
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"method": "bmtpt"', "zero_shot.json is not JSON: "), ("{}", "zero_shot.json has no 'method'")],
)
def test_a_damaged_file_is_named_and_the_source_stage_stays(made: Path, text: str, said: str) -> None:
    (made / "source-bmtpt-0" / "zero_shot.json").write_text(text)
    found = find_runs([made])
    (line,) = found.damaged
    assert line.startswith(f"{made}/source-bmtpt-0: damaged: {said}")
    assert [run.stage for run in found.runs if run.path.name == "source-bmtpt-0"] == ["source"]
    assert labels_in(made) == {"bmtpt": 1, "vanilla_transfer": 2}


# --- the picture -----------------------------------------------------------------------------------------------------


def test_a_curve_begins_at_0_and_its_settings_agree(made: Path) -> None:
    ours, _ = curves = shot_curves(groups_in(made))
    assert [curve.label for curve in curves] == ["bmtpt", "vanilla_transfer"]
    assert (ours.places, [cell.mean for cell in ours.cells]) == ([0, 4], [40.5, 60.5])
    assert list(ours.differing) == []  # the target stage's steps are no difference to none
    (section,) = sections(groups_in(made))
    assert not [note for note in section.notes if "between models and shots" in note]


def test_other_settings_along_a_curve_from_0_are_still_said(made: Path) -> None:
    adapt_run(made / "more", {"rte": 70.0}, shots=16, particles="elsewhere", settings={"target.steps": 200})
    ours = next(curve for curve in shot_curves(groups_in(made)) if curve.label == "bmtpt")
    assert ours.places == [0, 4, 16]
    assert "target.steps" in ours.differing


def test_0_has_a_place_on_the_axis(made: Path, tmp_path: Path, monkeypatch) -> None:
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.setdefault(path.name, figure))
    plot_all(tmp_path, groups_in(made), [], [], [])
    (panel,) = figures["shots.png"].axes
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "4"]
    points = panel.transData.transform(panel.lines[0].get_xydata())
    left, right = (panel.transAxes.inverted().transform(point)[0] for point in points)
    assert 0 < left < right < 1


# --- a real run ------------------------------------------------------------------------------------------------------


def test_what_evaluate_writes(runs, tmp_path: Path, capsys) -> None:
    source = tmp_path / "source"
    shutil.copytree(runs.source, source)
    file = source / "zero_shot.json"
    assert main(["evaluate", "--prompt", str(source), "--task", "mrpc", "--json", str(file)]) == 0
    capsys.readouterr()
    assert main(["report", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "0 adaptations, 1 source stage (1 scored at 0 shots); 0 unfinished, 0 damaged" in capsys.readouterr().out
    (line,) = (f for f in csv.DictReader((tmp_path / "out/report.csv").open()) if f["from"] == "ours")
    scores = json.loads(file.read_text())
    assert (line["shots"], float(line["mean"])) == ("0", scores["tasks"]["mrpc"]["score"])
    ours = json.loads((zero_shot_run(tmp_path / "made", {"mrpc": 1.0}) / "zero_shot.json").read_text())
    assert scores.keys() == ours.keys()
    assert scores["shots"] == ours["shots"]
