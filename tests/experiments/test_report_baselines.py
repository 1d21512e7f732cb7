"""Which groups `bmtpt report` compares with which."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from bmtpt_ds.cli import main
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.reporting.groups import group_runs
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.statistics import Difference
from bmtpt_ds.experiments.reporting.tables import comparisons
from tests.experiments.made_runs import adapt_run

LONG = {"source.steps": 1500}
TUNED, LOW, HIGH, OURS = "prompt_tuning", "vanilla_transfer", "vanilla_transfer/source.steps=1500", "bmtpt"


@pytest.fixture
def methods(tmp_path: Path) -> Path:
    """At 16 shots one seed of each method, two variants of vanilla transfer; at 4 shots no prompt tuning."""
    adapt_run(tmp_path / "tuned", {"rte": 60.0}, method="prompt_tuning", particles="none")
    adapt_run(tmp_path / "low", {"rte": 62.0}, method="vanilla_transfer")
    adapt_run(tmp_path / "high", {"rte": 65.0}, method="vanilla_transfer", settings=LONG)
    adapt_run(tmp_path / "ours", {"rte": 70.0})
    adapt_run(tmp_path / "ours-4", {"rte": 55.0}, shots=4)
    adapt_run(tmp_path / "transfer-4", {"rte": 50.0}, method="vanilla_transfer", shots=4, settings=LONG)
    return tmp_path


def found_in(folder: Path, baselines: Sequence[str] = ()) -> list[tuple[int, str, str, float]]:
    """Shots, method, baseline and difference of each comparison, in their order."""
    groups, _ = group_runs(find_runs([folder]).runs)
    return [(c.group.shots, c.group.label, c.baseline.label, c.difference.mean) for c in comparisons(groups, baselines)]


def test_prompt_tuning_and_all_vanilla_transfer_are_the_usual_baselines(methods: Path) -> None:
    """The label of the run of 4 shots, which differs from no other one, is plain `vanilla_transfer`."""
    assert found_in(methods) == [
        (4, OURS, LOW, 5),
        *((16, OURS, *rest) for rest in ((TUNED, 10), (LOW, 8), (HIGH, 5))),
        (16, LOW, TUNED, 2),
        *((16, HIGH, *rest) for rest in ((TUNED, 5), (LOW, 3))),
    ]


def test_vocabulary_rows_stand_in_where_prompt_tuning_is_missing(tmp_path: Path) -> None:
    for name, particles, score in (("posterior", "runs/source", 60.0), ("vocabulary", "none", 50.0)):
        for method in ("bmtpt", "vanilla_transfer"):
            adapt_run(tmp_path / f"{method}-{name}", {"rte": score}, method=method, particles=particles)
    scratch = "bmtpt/particles=none"
    found = [(label, baseline) for _, label, baseline, _ in found_in(tmp_path) if label == OURS]
    assert found == [(OURS, baseline) for baseline in (scratch, LOW, "vanilla_transfer/particles=none")]
    adapt_run(tmp_path / "tuned", {"rte": 55.0}, method="prompt_tuning", particles="none")
    assert scratch not in {baseline for _, _, baseline, _ in found_in(tmp_path)}


def test_a_baseline_counts_once_though_it_is_one_in_two_ways(tmp_path: Path) -> None:
    adapt_run(tmp_path / "vocabulary", {"rte": 50.0}, method="vanilla_transfer", particles="none")
    adapt_run(tmp_path / "ours", {"rte": 60.0})
    assert found_in(tmp_path) == [(16, OURS, "vanilla_transfer/particles=none", 10)]


def test_named_baselines_are_those_alone(methods: Path) -> None:
    """One that other shots lack is no baseline there; none is compared with itself, nor with one that comes later."""
    assert found_in(methods, [HIGH, OURS]) == [
        (4, LOW, OURS, -5),
        (16, OURS, HIGH, 5),
        *((16, TUNED, *rest) for rest in ((HIGH, -5), (OURS, -10))),
        *((16, LOW, *rest) for rest in ((HIGH, -3), (OURS, -8))),
    ]


def test_a_pair_without_a_spread(methods: Path) -> None:
    adapt_run(methods / "tie", {"rte": 60.0}, method="spot")
    groups, _ = group_runs(find_runs([methods]).runs)
    (tie,) = (c.difference for c in comparisons(groups, [TUNED]) if c.group.method == "spot")
    assert tie == Difference(0, None, wins=0, ties=1, losses=0)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["prompt_tunning"], "did you mean prompt_tuning"),
        (["bmtpt", "prompt_tunning"], "--baseline prompt_tunning: .*did you mean prompt_tuning"),
        (["bmtpt", "prompt_tuning", "bmtpt"], "--baseline names bmtpt more than once"),
    ],
)
def test_mistaken_names(methods: Path, names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        found_in(methods, names)


def test_the_table_of_several_baselines(methods: Path, tmp_path: Path, capsys) -> None:
    command = ["report", str(methods), "--out", str(tmp_path / "out"), "--baseline", TUNED, HIGH]
    assert main(command) == 0
    table = capsys.readouterr().out.partition("## Paired differences")[2]
    for baseline, difference in ((TUNED, 10), (HIGH, 5)):
        assert re.search(rf"\| {OURS} +\| {baseline} +\| t5-base \| +16 \| +1 \| +\+{difference}\.0 \|", table)
    assert not re.search(rf"\| {LOW} +\| t5-base", table)  # as what others are against
