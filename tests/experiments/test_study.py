"""The reader of a study's runs: it refuses unequal budgets and gaps, and its figures are those of the runs."""

import json
import shutil
from pathlib import Path

import pytest

from tests.benchmarks.study import Budgets, check, collected, read_study
from tests.experiments.made_runs import adapt_run, source_run, write_lines, zero_shot_run

EQUAL = Budgets(steps={100: ("a", "b")}, row_passes={1000: ("a", "b")}, baselines=("a",))
TARGET = {"target.steps": 60, "target.batch_size": 16}
BUDGET = (1000, 960)


def made_source(folder: Path, **settings) -> None:
    source_run(folder, particles=5, steps=100, **settings)
    lines = (folder / "metrics.jsonl").read_text()
    line = {"step": 100, "validation": {"sst2": 80.0, "mean": 80.0}, "majority": {"sst2": 51.0, "mean": 51.0}}
    (folder / "metrics.jsonl").write_text(lines + json.dumps(line) + "\n")


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two variants, two seeds, two tasks, 16 shots, as `bmtpt scale` lays them out."""
    for variant, score, prior in (("a", 50.0, "gaussian"), ("b", 60.0, "none")):
        for seed in (0, 1):
            place, named = tmp_path / "t5" / variant, {"run.name": variant}
            made_source(place / f"source-{seed}", seed=seed, settings=named)
            for task in ("rte", "mrpc"):
                run = place / f"adapt-16-{seed}" / "runs" / f"{task}-{seed}"
                adapt_run(
                    run,
                    {task: score + seed},
                    seed=seed,
                    budget=BUDGET,
                    settings=TARGET | named | {"target.prior": prior},
                )
    return tmp_path


def test_scores_and_differences_are_the_runs(grid: Path) -> None:
    study = read_study(grid, EQUAL)
    check(study, EQUAL)
    found = collected(study, EQUAL)
    assert found["scores"][16]["b"] == {"rte": {0: 60.0, 1: 61.0}, "mrpc": {0: 60.0, 1: 61.0}}
    (difference,) = found["differences"]
    assert (difference["variant"], difference["baseline"], difference["shots"]) == ("b", "a", 16)
    assert (difference["mean"], difference["wins"], difference["losses"]) == (10.0, 4, 0)
    assert found["sources"]["a"][1]["validation"] == {"sst2": 80.0, "mean": 80.0}
    json.dumps(found)


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        (EQUAL._replace(steps={99: ("b",)}), "b, seed 0: 100 source steps, not 99"),
        (EQUAL._replace(steps={100: ("a", "c")}), r"c: source runs of seeds \[\], not \[0, 1\]"),
        (EQUAL._replace(row_passes={1002: ("b",)}), "b, seed 0: 1000 row passes, not 1002"),
    ],
)
def test_unequal_budgets_are_refused(grid: Path, budgets: Budgets, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check(read_study(grid, budgets), budgets)


def test_other_rows_in_the_target_stage_are_refused(grid: Path) -> None:
    results = grid / "t5/b/adapt-16-1/runs/rte-1/results.json"
    results.write_text(results.read_text().replace("960", "976"))
    with pytest.raises(AssertionError, match="rte-1: 976 row passes of the target stage, not 960"):
        check(read_study(grid, EQUAL), EQUAL)


def test_variants_that_do_not_differ_are_refused(grid: Path) -> None:
    for config in (grid / "t5/b").rglob("config.yaml"):
        config.write_text(config.read_text().replace("prior: none", "prior: gaussian"))
    with pytest.raises(AssertionError, match="task, seed and settings are those of"):
        read_study(grid, EQUAL)


def test_a_gap_is_refused(grid: Path) -> None:
    shutil.rmtree(grid / "t5/b/adapt-16-1/runs/rte-1")
    with pytest.raises(AssertionError, match="b, 16 shots: other tasks or seeds than the rest"):
        check(read_study(grid, EQUAL), EQUAL)


def test_a_seed_of_one_source_stage_alone_is_refused(grid: Path) -> None:
    zero_shot_run(grid / "t5/b/source-2", {"rte": 40.0}, seed=2, steps=100, settings={"run.name": "b"})
    with pytest.raises(AssertionError, match=r"a: source runs of seeds \[0, 1\], not \[0, 1, 2\]"):
        check(read_study(grid, EQUAL), EQUAL)


def test_validation_picks_the_best(grid: Path) -> None:
    """The variant with the better validation score counts, though its test score is the worse one."""
    for variant, validation in (("a", 70.0), ("b", 65.0)):
        for run in (grid / f"t5/{variant}").glob("adapt-*/runs/*"):
            write_lines(run, [{"step": 20, "validation": {"best": validation, "best_step": 20}}])
    budgets = EQUAL._replace(best_of={"best": ("a", "b")})
    found = collected(read_study(grid, budgets), budgets)
    assert found["scores"][16]["best"] == found["scores"][16]["a"]
