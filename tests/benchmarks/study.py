"""Every score of a study as one file, and the proof that the budgets it compares are equal.

Reads finished runs of `bmtpt scale --config study/NAME --out FOLDER`, trains nothing. What is called equal is asserted
from what the runs wrote: steps from the last line of `metrics.jsonl`, row passes (rows times prompts that the backbone
saw in training, what MPT's teachers read and SPoT's probes included) from `results.json`. Seeds are those of all runs.

    python -m tests.benchmarks.study core runs/study [--out FILE]

Ends with one JSON line: the differences that the study is about.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from bmtpt_ds.config import override_recipe
from bmtpt_ds.experiments.reporting.groups import Group, group_runs
from bmtpt_ds.experiments.reporting.runs import Run, find_runs
from bmtpt_ds.experiments.reporting.tables import comparisons
from bmtpt_ds.files import write_atomically


class Budgets(NamedTuple):
    """Which variants of a study are said to have spent the same on their source stages."""

    steps: Mapping[int, Sequence[str]]
    row_passes: Mapping[int, Sequence[str]]
    baselines: Sequence[str]  # that all others are compared with
    best_of: Mapping[str, Sequence[str]] = {}  # name: variants, of which each run's validation rows pick one


STUDIES = {
    "core": Budgets(
        steps={
            300: ("bmtpt_paper", "vanilla_short", "spot_short", "mpt_short"),
            1500: ("bmtpt", "vanilla", "spot"),
        },
        row_passes={
            3_000: ("vanilla_short", "spot_short"),
            15_000: ("bmtpt", "bmtpt_paper", "vanilla", "spot", "mpt"),
        },
        baselines=("prompt_tuning", "vanilla", "vanilla_short"),
    ),
    "ten_seeds": Budgets(
        steps={1500: ("bmtpt", "vanilla")}, row_passes={15_000: ("bmtpt", "vanilla")}, baselines=("vanilla",)
    ),
    "ablations": Budgets(
        steps={},
        row_passes={
            7_500: (
                *("bmtpt", "particles_1", "particles_3", "particles_10", "kappa_5", "shared_rows"),
                *("median_none", "median_log_paper", "median_log_matched", "median_log_none"),
                *("likelihood_1000", "length_10", "length_40"),
            )
        },
        baselines=("bmtpt",),
        best_of={"best_particle": [f"start_{particle}" for particle in range(5)]},
    ),
}
SAME = 1e-3  # steps are whole: by which share row passes that are called the same may differ


class Study(NamedTuple):
    """The runs of a grid."""

    sources: dict[str, dict[int, Run]]  # by variant and seed
    groups: list[Group]  # a variant each at a number of shots; 0 shots: the source stage's prompt as it is


def read_study(folder: Path, budgets: Budgets) -> Study:
    """The runs below a folder.

    Raises:
        AssertionError: a run is unfinished or damaged, or two variants cannot be told apart.
    """
    found = find_runs([folder])
    groups, left_out = group_runs(found.runs)
    assert not found.rest + left_out, "\n".join(found.rest + left_out)
    assert all(group.name for group in groups), f"no name: {[group.label for group in groups if not group.name]}"
    sources: dict[str, dict[int, Run]] = {}
    for run in found.runs:
        if run.stage == "source":
            sources.setdefault(run.config["run"]["name"], {})[run.seed] = run
    return Study(sources, groups + picked_groups(groups, budgets.best_of))


def picked_groups(groups: Sequence[Group], best_of: Mapping[str, Sequence[str]]) -> list[Group]:
    """A group for each name in `best_of` and number of shots: of every task and seed the run whose best validation
    score is the highest, the first of equals."""
    found = []
    for name, variants in best_of.items():
        for shots in dict.fromkeys(group.shots for group in groups if group.name in variants):
            picked: dict[tuple[str, int], Run] = {}
            for run in (run for g in groups if g.name in variants and g.shots == shots for run in g.runs):
                place = *run.tasks, run.seed
                if place not in picked or best_validation(run) > best_validation(picked[place]):
                    picked[place] = run
            runs = tuple(picked.values())
            found.append(Group(runs[0].method, "", runs[0].model, shots, runs, name))
    return found


def check(study: Study, budgets: Budgets) -> None:
    """Asserts that what is called equal is there, and equal."""
    seeds = {run.seed for group in study.groups for run in group.runs}
    for steps, variants in budgets.steps.items():
        for name, run in sources_of(study, variants, seeds):
            assert last_step(run) == steps, f"{name}: {last_step(run)} source steps, not {steps}"
    for count, variants in budgets.row_passes.items():
        for name, run in sources_of(study, variants, seeds):
            passes = run.rows_processed[0]
            assert abs(passes - count) <= SAME * count, f"{name}: {passes} row passes, not {count}"
    places = {(task, run.seed) for group in study.groups for run in group.runs for task in run.tasks}
    for group in study.groups:
        own = {(task, run.seed) for run in group.runs for task in run.tasks}
        assert own == places, f"{group.label}, {group.shots} shots: other tasks or seeds than the rest"
        for run in group.runs:
            passes, expected = run.rows_processed[1], target_passes(run)
            assert passes == expected, f"{run.path}: {passes} row passes of the target stage, not {expected}"


def sources_of(study: Study, variants: Sequence[str], seeds: set[int]) -> list[tuple[str, Run]]:
    for name in variants:
        there = set(study.sources.get(name, ()))
        assert there == seeds, f"{name}: source runs of seeds {sorted(there)}, not {sorted(seeds)}"
    return [(f"{name}, seed {seed}", run) for name in variants for seed, run in study.sources[name].items()]


def target_passes(run: Run) -> int:
    """What the recipe's target stage costs, SPoT's probe included."""
    if run.stage == "zero_shot":
        return 0
    recipe = override_recipe(run.config, [], str(run.path))
    steps = recipe.target.steps + (recipe.probe_steps if recipe.method == "spot" else 0)
    return steps * min(recipe.target.batch_size, run.shots or sys.maxsize)


def last_step(run: Run) -> int:
    return max(line["step"] for line in run.lines)


def best_validation(run: Run) -> float:
    return run.validations[-1]["validation"]["best"]


def source_stage(run: Run) -> dict[str, Any]:
    """What a source stage cost, and what its prompts say of its own tasks' validation rows after the last step."""
    last = run.validations[-1]
    return {
        "steps": last_step(run),
        "row_passes": run.rows_processed[0],
        "validation": last["validation"],
        "majority": last["majority"],
    }


def recipe_of(run: Run) -> dict[str, Any]:
    """A run's recipe without where this machine keeps the model and the rows."""
    config = {**run.config, "model": {**run.config["model"], "name_or_path": run.model}}
    return config | {"data": {key: value for key, value in run.config["data"].items() if key != "root"}}


def differences(groups: Sequence[Group], baselines: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"variant": c.group.label, "baseline": c.baseline.label, "shots": c.group.shots, **c.difference._asdict()}
        for c in comparisons(groups, baselines)
    ]


def collected(study: Study, budgets: Budgets) -> dict[str, Any]:
    runs = [run for group in study.groups for run in group.runs]
    versions = runs[0].results["versions"]
    assert all(run.results["versions"] == versions for run in runs), "runs of several versions"
    tasks = {task: scores for run in runs for task, scores in run.tasks.items()}
    scores: dict[int | None, dict[str, dict[str, dict[int, float]]]] = {}
    for group in study.groups:
        scores.setdefault(group.shots, {})[group.label] = {task: group.scores(task) for task in group.tasks}
    return {
        "date": date.today().isoformat(),
        "versions": versions,
        "model": runs[0].model,
        "seeds": sorted({run.seed for run in runs}),
        "tasks": {task: {key: scored[key] for key in ("metric", "majority", "rows")} for task, scored in tasks.items()},
        "sources": {
            name: {seed: source_stage(run) for seed, run in by_seed.items()} for name, by_seed in study.sources.items()
        },
        "scores": scores,
        "recipes": {name: recipe_of(next(iter(by_seed.values()))) for name, by_seed in study.sources.items()},
        "differences": differences(study.groups, budgets.baselines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("folder", type=Path, help="--out of bmtpt scale")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    budgets = STUDIES[arguments.study]
    study = read_study(arguments.folder, budgets)
    check(study, budgets)
    found = collected(study, budgets)
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found["differences"]))


if __name__ == "__main__":
    main()
