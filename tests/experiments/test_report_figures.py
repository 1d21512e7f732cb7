"""The figures of `bmtpt report` against numpy, scipy and sums done by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from bmtpt_ds.experiments.reporting.groups import Group, group_runs
from bmtpt_ds.experiments.reporting.paper import benchmarks, paper_rows
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.series import distances, shot_curves, size_curves, svgd_shares
from bmtpt_ds.experiments.reporting.statistics import bootstrap_interval, paired_difference
from bmtpt_ds.experiments.reporting.tables import Column, Row, Section, comparisons, sections
from bmtpt_ds.svgd import svgd_direction
from tests.experiments.made_runs import MAJORITY, adapt_run, source_run, write_lines

RTE, MRPC = {0: 70.0, 1: 72.0, 2: 77.0}, {0: 80.0, 1: 83.0, 2: 81.0}


def groups_in(folder: Path) -> list[Group]:
    groups, lines = group_runs(find_runs([folder]).runs)
    assert not lines
    return groups


def row_of(section: Section, label: str, origin: str = "ours") -> Row:
    (row,) = (row for row in section.rows if (row.label, row.origin) == (label, origin))
    return row


@pytest.fixture
def two_tasks(tmp_path: Path) -> Path:
    """Two tasks of three seeds from a posterior, and from vocabulary rows four points lower, a seed of one missing."""
    for task, scores in (("rte", RTE), ("mrpc", MRPC)):
        for seed, score in scores.items():
            adapt_run(tmp_path / f"{task}-{seed}", {task: score}, seed=seed)
            if (task, seed) != ("mrpc", 2):
                adapt_run(tmp_path / f"none-{task}-{seed}", {task: score - 4 + seed}, seed=seed, particles="none")
    return tmp_path


def test_means_and_deviations(two_tasks: Path) -> None:
    (section,) = sections(groups_in(two_tasks))
    row = row_of(section, "bmtpt")
    for task, scores in (("rte", RTE), ("mrpc", MRPC)):
        cell, values = row.cells[Column(task, "accuracy")], list(scores.values())
        assert cell.mean == pytest.approx(np.mean(values))
        assert cell.std == pytest.approx(np.std(values, ddof=1))
        assert cell.seeds == 3
    of_seeds = [(RTE[seed] + MRPC[seed]) / 2 for seed in RTE]
    mean = row.cells[Column("", "")]
    assert mean == pytest.approx((np.mean(of_seeds), stats.tstd(of_seeds), 3))
    assert (row.seeds, row.rows_source, row.rows_target) == ((3,), (600,), (960,))


def test_unequal_seeds_have_a_mean_of_means(two_tasks: Path) -> None:
    (section,) = sections(groups_in(two_tasks))
    row = row_of(section, "bmtpt/particles=none")
    assert row.seeds == (2, 3)
    rte, mrpc = np.mean([66, 69, 75]), np.mean([76, 80])
    assert row.cells[Column("", "")] == pytest.approx(((rte + mrpc) / 2, None, None))


def test_majority_is_a_row_and_a_constant_correlates_with_nothing(tmp_path: Path) -> None:
    adapt_run(tmp_path / "a", {"cola": 80.0, "rte": 60.0}, settings={"target.multi": True})
    (section,) = sections(groups_in(tmp_path))
    row = row_of(section, "majority class", "majority")
    assert row.cells[Column("rte", "accuracy")].mean == MAJORITY["rte"]
    assert row.cells[Column("cola", "accuracy", True)].mean == MAJORITY["cola"]
    assert row.cells[Column("cola", "matthews", True)].mean == 0


def test_cola_both_ways(tmp_path: Path) -> None:
    """The paper's BMTPT has accuracy alone, its peers have Matthews alone; so have their means."""
    for task in benchmarks()["GLUE"]:
        adapt_run(tmp_path / task, {task: 80.0}, shots=None)
    (section,) = sections(groups_in(tmp_path))
    accuracy, matthews = (Column("cola", metric, True) for metric in ("accuracy", "matthews"))
    ours, theirs = row_of(section, "bmtpt"), row_of(section, "bmtpt", "paper")
    assert (ours.cells[accuracy].mean, ours.cells[matthews].mean) == (80, 30)
    assert ours.cells[Column("", "matthews")].mean == pytest.approx((7 * 80 + 30) / 8)
    assert theirs.cells[accuracy][:2] == (86.6, 0.69)
    assert matthews not in theirs.cells
    assert theirs.cells[Column("", "accuracy")].mean == 88.7  # as printed
    assert Column("", "matthews") not in theirs.cells
    peer = row_of(section, "mpt", "quoted")
    assert peer.cells[matthews].mean == 62.4
    assert accuracy not in peer.cells
    assert peer.cells[Column("", "matthews")].mean == 85.6
    assert row_of(section, "vanilla_transfer", "paper").cells[accuracy].mean == 83.2


def test_part_of_a_benchmark_is_averaged_as_the_part_that_it_is(two_tasks: Path) -> None:
    (section,) = sections(groups_in(two_tasks))
    paper = row_of(section, "bmtpt", "paper")  # 16 shots
    assert paper.cells[Column("", "")].mean == pytest.approx((63.5 + 77.0) / 2)


@pytest.mark.parametrize(("model", "shots"), [("google-t5/t5-base", 8), ("google/flan-t5-base", None)])
def test_other_models_and_shots_have_no_paper_beside_them(tmp_path: Path, model: str, shots: int | None) -> None:
    adapt_run(tmp_path / "a", {"rte": 60.0}, model=model, shots=shots)
    (section,) = sections(groups_in(tmp_path))
    assert {row.origin for row in section.rows} == {"majority", "ours"}


def test_multi_task_rows_stand_beside_multi_task_runs(tmp_path: Path) -> None:
    adapt_run(tmp_path / "a", {"rte": 60.0, "mrpc": 70.0}, shots=None, settings={"target.multi": True})
    (section,) = sections(groups_in(tmp_path))
    theirs = [row for row in section.rows if row.origin in ("paper", "quoted")]
    assert all(row.label.endswith(", multi-task") for row in theirs)
    assert row_of(section, "hyperformer, multi-task", "quoted").cells[Column("rte", "accuracy")].mean == 75.4
    assert any("hyperformer and hyperdecoder" in note and "does not run" in note for note in section.notes)


@pytest.mark.shared
def test_the_paper_s_figures_are_the_paper_s(shared: Path) -> None:
    tables = yaml.safe_load((shared / "paper" / "tables.yaml").read_text())
    table1, table3 = tables["table1"], tables["table3"]
    names = {
        (1, setting): {"adapter" if name == "adapters" else name: row for name, row in table1[part].items()}
        for setting, part in (("single task", "single"), ("multi-task", "multi"))
    }  # our name of the method in both tables
    names |= {(2, shots): tables["table2"][f"k{shots}"] for shots in (4, 16, 32)}
    names[4, "single task"] = tables["table4"]
    others = {"t5-large": "t5_large", "t5-3b": "t5_3b", "no prior": "no_prior", "10 particles": "ten_particles"}
    others |= {"3 of 6 source tasks a step": "source_sampling_1", "6 of 12 source tasks a step": "source_sampling_2"}
    counted = 0
    for row in paper_rows():
        if row.table == 3:
            columns = tables["table3"]["columns"]
            typed = table3[others[row.model if row.model != "t5-base" else row.setting]]
        else:
            columns = tables[f"table{row.table}"]["columns"]
            typed = names[row.table, row.shots or row.setting][row.method]
        shown = {task: cell.mean for task, cell in row.scores.items()}
        shown |= {f"{name.lower()}_avg": value for name, value in row.averages.items()}
        assert shown == {name: value for name, value in zip(columns, typed, strict=True) if value is not None}
        counted += 1
    assert counted == 9 + 7 + 3 * 3 + 6 + 8
    (ours,) = (r for r in paper_rows() if (r.table, r.method, r.setting) == (1, "bmtpt", "single task"))
    assert [c.std for c in ours.scores.values()] == [s for s in table1["single"]["bmtpt_std"] if s is not None]


# --- groups ----------------------------------------------------------------------------------------------------------


def test_a_variant_is_what_differs_and_is_not_the_default(tmp_path: Path) -> None:
    for seed in (0, 1):
        adapt_run(tmp_path / f"a{seed}", {"rte": 60.0}, seed=seed, settings={"run.log_every": 5 + seed})
        adapt_run(tmp_path / f"b{seed}", {"rte": 60.0}, seed=seed, settings={"target.prior": "none"})
        settings = {"source.svgd.damping": 0.5, "target.steps": 100, "source.tasks": ["sst2", "cola"]}
        adapt_run(tmp_path / f"c{seed}", {"rte": 60.0}, seed=seed, settings=settings)
    labels = {group.label: len(group.runs) for group in groups_in(tmp_path)}
    several = "bmtpt/source.tasks=sst2+cola, damping=0.5, target.steps=100"
    assert labels == {"bmtpt": 2, "bmtpt/prior=none": 2, several: 2}


def test_runs_from_scratch_differ_by_nothing_that_they_do_not_use(tmp_path: Path) -> None:
    for seed, prior in ((0, "gaussian"), (1, "mixture")):
        adapt_run(tmp_path / f"{seed}", {"rte": 1.0}, seed=seed, particles="none", settings={"target.prior": prior})
    (group,) = groups_in(tmp_path)
    assert (group.label, len(group.runs)) == ("bmtpt/particles=none", 2)


def test_seeds_of_the_source_stage_are_no_variants_and_other_posteriors_are(tmp_path: Path) -> None:
    for seed in (0, 1):
        adapt_run(tmp_path / f"one/{seed}", {"rte": 60.0}, seed=seed, particles=f"runs/source-{seed}")
    (group,) = groups_in(tmp_path / "one")
    assert group.label == "bmtpt"
    for seed in (0, 1):
        adapt_run(tmp_path / f"two/a{seed}", {"rte": 60.0}, seed=seed, particles="runs/a")
        adapt_run(tmp_path / f"two/b{seed}", {"rte": 60.0}, seed=seed, particles="runs/b")
    assert {g.label for g in groups_in(tmp_path / "two")} == {"bmtpt/particles=runs/a", "bmtpt/particles=runs/b"}


def test_the_source_run_says_what_the_particles_are(tmp_path: Path) -> None:
    source_run(tmp_path / "ten", particles=10)
    source_run(tmp_path / "five")
    for name in ("ten", "five"):
        adapt_run(tmp_path / f"rte-{name}", {"rte": 60.0}, particles=str(tmp_path / name))
    assert {group.label for group in groups_in(tmp_path)} == {"bmtpt", "bmtpt/source.particles=10"}


def test_the_same_run_twice_counts_once_and_is_named(tmp_path: Path) -> None:
    for name in "ab":
        adapt_run(tmp_path / name, {"rte": 60.0})
    groups, (line,) = group_runs(find_runs([tmp_path]).runs)
    assert len(groups[0].runs) == 1
    assert line.startswith(f"{tmp_path}/b: left out")


# --- statistics ------------------------------------------------------------------------------------------------------


def test_paired_differences_by_hand(two_tasks: Path) -> None:
    """Of rte 4, 3 and 2 points, of mrpc 4 and 3; the third seed of mrpc has no pair."""
    ((group, baseline, found),) = comparisons(groups_in(two_tasks))
    assert (group.label, baseline.label) == ("bmtpt", "bmtpt/particles=none")
    assert found.mean == pytest.approx((3 + 3.5) / 2)
    assert (found.pairs, found.wins, found.ties, found.losses) == (5, 5, 0, 0)
    low, high = found.interval
    assert 2 <= low < found.mean < high <= 4
    ((_, _, reverse),) = comparisons(groups_in(two_tasks), ["bmtpt"])
    assert reverse.mean == -found.mean
    assert (reverse.wins, reverse.losses) == (0, 5)


def test_nothing_in_common_is_no_difference() -> None:
    assert paired_difference({"rte": {0: 1.0}}, {"rte": {1: 1.0}, "mrpc": {0: 1.0}}) is None


def test_bootstrap_of_one_task_is_the_usual_one() -> None:
    values = np.random.default_rng(1).normal(2, 3, 40)
    ours = bootstrap_interval([values])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.1)
    assert bootstrap_interval([values]) == ours
    assert bootstrap_interval([values], seed=1) != ours


def test_bootstrap_over_tasks_and_seeds() -> None:
    """Equal tasks: as wide as the mean of their seeds. Equal seeds: as wide as the mean of the tasks."""
    seeds = np.array([-3.0, 0.0, 3.0])
    low, high = bootstrap_interval([seeds] * 16)
    assert (high - low) / 2 == pytest.approx(1.96 * seeds.std() / np.sqrt(3 * 16), rel=0.05)
    tasks = np.random.default_rng(3).normal(0, 1, 30)
    low, high = bootstrap_interval([np.full(3 + k % 2, value) for k, value in enumerate(tasks)])
    assert (high - low) / 2 == pytest.approx(1.96 * tasks.std() / np.sqrt(30), rel=0.05)


def test_bootstrap_covers_the_truth() -> None:
    """Of 200 experiments with 13 tasks of 5 seeds the interval holds the mean that they were drawn with in about 19 of
    20; 13 tasks make it a little narrow."""
    generator, held = np.random.default_rng(4), 0
    for _ in range(200):
        of_tasks = generator.normal(1.5, 2, 13)
        low, high = bootstrap_interval([task + generator.normal(0, 1, 5) for task in of_tasks])
        held += low <= 1.5 <= high
    assert 0.88 <= held / 200 <= 0.98


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_curves_are_over_the_tasks_that_all_places_have(tmp_path: Path) -> None:
    for shots, scores in ((4, {"rte": 50.0, "mrpc": 70.0}), (16, {"rte": 60.0}), (None, {"rte": 90.0})):
        for task, score in scores.items():
            adapt_run(tmp_path / f"{task}-{shots}", {task: score}, shots=shots)
    adapt_run(tmp_path / "large", {"rte": 95.0}, shots=None, model="google-t5/t5-large")
    groups = groups_in(tmp_path)
    (shots,) = shot_curves(groups)
    assert (shots.places, [cell.mean for cell in shots.cells], shots.tasks) == ([4, 16], [50, 60], ["rte"])
    (sizes,) = size_curves(groups)
    assert sizes.label == "bmtpt, all rows"
    assert [cell.mean for cell in sizes.cells] == [90, 95]
    assert sizes.places == [222_903_552, 737_668_096]


def test_what_else_differs_along_a_curve_is_said(tmp_path: Path) -> None:
    for shots, rate in ((4, 0.1), (16, 0.3)):
        adapt_run(tmp_path / f"{shots}", {"rte": 50.0}, shots=shots, settings={"target.lr_full": rate})
    groups = groups_in(tmp_path)
    assert [group.label for group in groups] == ["bmtpt", "bmtpt"]
    assert [curve.differing for curve in shot_curves(groups)] == [["lr_full"]]
    (section,) = sections(groups)
    assert "bmtpt: between models and shots its recipe differs in lr_full too." in section.notes


def test_models_of_two_families_are_two_curves(tmp_path: Path) -> None:
    for model in ("google-t5/t5-base", "google/flan-t5-large", "google/flan-t5-xl", "mine/of-no-known-size"):
        adapt_run(tmp_path / model, {"rte": 50.0}, model=model)
    (curve,) = size_curves(groups_in(tmp_path))
    assert curve.label == "bmtpt, 16 shots, flan-t5"


def test_scores_on_different_rows_are_said_to_be(tmp_path: Path) -> None:
    adapt_run(tmp_path / "a", {"rte": 50.0}, rows=100)
    adapt_run(tmp_path / "b", {"rte": 50.0}, rows=2000, seed=1)
    (section,) = sections(groups_in(tmp_path))
    assert section.notes == ["rte: scored on different rows (100 and 2,000); its figures cannot be compared."]


def test_share_of_svgd_is_the_median_without_the_first_line(tmp_path: Path) -> None:
    source_run(tmp_path / "a", steps=30)
    (share,) = svgd_shares(find_runs([tmp_path]).runs, [])
    assert share.ratio == pytest.approx((0.004 + 20e-7) / 0.5)


@pytest.mark.parametrize("bandwidth", ["median_log", "median", "printed", 7.5])
def test_spread_is_the_distance_that_the_bandwidth_came_from(tmp_path: Path, bandwidth: str | float) -> None:
    """Three particles 3, 4 and 5 apart: the median distance is 4. A bandwidth that was given tells nothing of it."""
    particles = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    h = float(svgd_direction(particles, torch.zeros(3, 2), bandwidth=bandwidth).bandwidth)
    folder = source_run(tmp_path / "run", particles=3, steps=10, settings={"source.svgd.bandwidth": bandwidth})
    lines = [json.loads(line) | {"bandwidth": h} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder, lines)
    (run,) = find_runs([folder]).runs
    expected = [] if bandwidth == 7.5 else [(1, pytest.approx(4.0)), (10, pytest.approx(4.0))]
    assert distances(run) == expected
