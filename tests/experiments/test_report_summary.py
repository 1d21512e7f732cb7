"""The means over all tasks in `bmtpt report`, a line a method and a column a number of labelled rows."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from bmtpt_ds.cli import main
from bmtpt_ds.experiments.reporting.grids import summary_grid
from bmtpt_ds.experiments.reporting.groups import group_runs
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.summary import Summary, summary
from tests.experiments.made_runs import MAJORITY, adapt_run, zero_shot_run

SCORES = {  # by shots, of a task of each benchmark, by seed
    4: {"rte": {0: 50.0, 1: 56.0}, "cb": {0: 61.0, 1: 59.0}},
    16: {"rte": {0: 60.0, 1: 66.0}, "cb": {0: 70.0, 1: 71.0}},
}


def summary_of(folder: Path) -> Summary | None:
    groups, lines = group_runs(find_runs([folder]).runs)
    assert not lines
    return summary(groups)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """BMTPT at 0, 4 and 16 shots, prompt tuning at 16; two tasks, of two benchmarks, and two seeds."""
    for shots, tasks in SCORES.items():
        for task, of_task in tasks.items():
            for seed, score in of_task.items():
                adapt_run(tmp_path / f"{shots}-{task}-{seed}", {task: score}, seed=seed, shots=shots)
                if shots == 16:
                    tuned = {"method": "prompt_tuning", "particles": "none", "budget": (0, 960)}
                    adapt_run(tmp_path / f"tuned-{task}-{seed}", {task: score - 8}, seed=seed, **tuned)
    for seed in (0, 1):
        zero_shot_run(tmp_path / f"source-{seed}", {"rte": 40.0 + seed, "cb": 45.0}, seed=seed)
    return tmp_path


def test_means_over_the_tasks_of_all_benchmarks(made: Path) -> None:
    found = summary_of(made)
    majority, ours, tuned = found.lines
    assert [line.label for line in found.lines] == ["majority class", "bmtpt", "prompt_tuning"]
    assert found.shots == [0, 4, 16]
    assert {cell.mean for cell in majority.cells.values()} == {(MAJORITY["rte"] + 50.0) / 2}
    for shots, tasks in SCORES.items():
        of_seeds = [np.mean([of_task[seed] for of_task in tasks.values()]) for seed in (0, 1)]
        assert ours.cells[shots] == pytest.approx((np.mean(of_seeds), np.std(of_seeds, ddof=1), 2))
    assert ours.cells[0].mean == pytest.approx((40.5 + 45) / 2)
    assert set(tuned.cells) == {16}
    assert tuned.cells[16].mean == pytest.approx(ours.cells[16].mean - 8)
    assert (ours.rows_source, tuned.rows_source) == ((100, 600), (0,))  # of made-up source stages and adaptations


def test_the_table(made: Path, tmp_path: Path, capsys) -> None:
    grid = summary_grid(summary_of(made))
    shots = ["0 shots", "4 shots", "16 shots"]
    assert grid.header == ["method", "model", "tasks", "seeds", *shots, "source rows processed"]
    assert grid.rows[2][:7] == ["prompt_tuning", "t5-base", "2", "2", "–", "–", "58.8 ± 2.5"]
    assert grid.notes == ["Means over cb, rte, in the tasks' headline metrics."]
    assert main(["report", str(made), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.md").read_text()
    assert re.search(r"## All tasks\n\n\| method .*?\n\| prompt_tuning +\| t5-base +\| +2 \|", page, re.S)
    assert page.index("## All tasks") < page.index("## GLUE")
    assert "All tasks" in (tmp_path / "out/report.tex").read_text()


def test_tasks_that_a_number_of_shots_lacks_are_left_out(made: Path) -> None:
    adapt_run(made / "more", {"mrpc": 90.0}, shots=16)
    before = summary_of(made).lines[1]
    assert before.tasks == {"rte", "cb"}
    assert before.cells[16].mean == pytest.approx(66.75)


def test_lines_of_different_tasks_are_said_not_to_compare(made: Path) -> None:
    adapt_run(made / "alone", {"rte": 99.0}, method="spot")
    found = summary_of(made)
    assert [line.label for line in found.lines] == ["bmtpt", "prompt_tuning", "spot"]  # no one majority for all
    (note,) = summary_grid(found).notes
    assert "lines of different tasks cannot be compared" in note


def test_nothing_in_common_is_no_line(tmp_path: Path) -> None:
    adapt_run(tmp_path / "a", {"rte": 60.0}, shots=4)
    adapt_run(tmp_path / "b", {"cb": 60.0}, shots=16)
    assert summary_of(tmp_path) is None


@pytest.mark.parametrize("scores", [{"rte": 60.0}, {"rte": 60.0, "mrpc": 70.0}])
def test_one_benchmark_and_number_of_shots_needs_no_summary(tmp_path: Path, scores: Mapping[str, float]) -> None:
    for task, score in scores.items():
        adapt_run(tmp_path / task, {task: score})
    assert summary_of(tmp_path) is None
