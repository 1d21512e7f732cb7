"""What `bmtpt report` calls runs that have a name of their own (`run.name`)."""

from pathlib import Path

from bmtpt_ds.experiments.reporting.groups import group_runs
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.series import shot_curves
from bmtpt_ds.experiments.reporting.tables import comparisons, sections
from tests.experiments.made_runs import adapt_run


def named(folder: Path, name: str | None, score: float, shots: int = 16, **settings) -> None:
    own = {"run.name": name, **{key.replace("__", "."): value for key, value in settings.items()}}
    adapt_run(folder, {"rte": score}, shots=shots, settings=own)


def labels(folder: Path) -> list[str]:
    return [group.label for group in group_runs(find_runs([folder]).runs)[0]]


def test_a_name_stands_for_what_differs(tmp_path: Path) -> None:
    for shots in (16, 32):
        named(tmp_path / f"wide-{shots}", "wide", 60.0 + shots, shots, target__prior="none", target__lr_full=0.1)
        named(tmp_path / f"usual-{shots}", "usual", 50.0, shots)
    groups, _ = group_runs(find_runs([tmp_path]).runs)
    assert {group.label for group in groups} == {"wide", "usual"}
    (section,) = sections(groups)
    assert "wide: bmtpt/lr_full=0.1, prior=none." in section.notes
    assert "usual: bmtpt." in section.notes
    assert [curve.label for curve in shot_curves(groups)] == ["usual", "wide"]
    found = {(c.group.shots, c.group.label): c.difference.mean for c in comparisons(groups, ["usual"])}
    assert found == {(16, "wide"): 26.0, (32, "wide"): 42.0}


def test_a_name_of_runs_with_other_settings_tells_nothing(tmp_path: Path) -> None:
    named(tmp_path / "a", "same", 50.0)
    named(tmp_path / "b", "same", 60.0, target__prior="none")
    assert labels(tmp_path) == ["bmtpt", "bmtpt/prior=none"]


def test_a_group_of_several_names_has_none(tmp_path: Path) -> None:
    named(tmp_path / "a", "first", 50.0)
    adapt_run(tmp_path / "b", {"rte": 60.0}, seed=1)
    assert labels(tmp_path) == ["bmtpt"]
