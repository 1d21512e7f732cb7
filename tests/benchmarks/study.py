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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from bmtpt_ds.experiments.reporting.records import read_lines
from bmtpt_ds.experiments.reporting.runs import Run, find_runs
from bmtpt_ds.experiments.reporting.statistics import paired_difference
from bmtpt_ds.files import write_atomically
from bmtpt_ds.run_files import METRICS, RUNS

Scores = dict[str, dict[int, float]]  # by task and seed


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
    "ablations": Budgets(
        steps={},
        row_passes={
            7_500: (
                *("bmtpt", "particles_1", "particles_3", "particles_10", "kappa_5", "shared_rows"),
                *("median_none", "median_log_paper", "median_log_matched", "median_log_none"),
                *("vocab", "likelihood_1", "likelihood_1000", "length_10", "length_40"),
            )
        },
        baselines=("bmtpt",),
        best_of={"best_particle": [f"start_{particle}" for particle in range(5)]},
    ),
}
SAME = 1e-3  # steps are whole: by which share row passes that are called the same may differ


class Study:
    """The runs of a grid by variant, shots and seed; 0 shots: the source stage's prompt as it is."""

    def __init__(self, folder: Path):
        """
        Raises:
            AssertionError: a run is unfinished or damaged.
        """
        found = find_runs([folder])
        assert not found.rest, "\n".join(found.rest)
        self.sources: dict[str, dict[int, Run]] = defaultdict(dict)
        self.scored: dict[str, dict[int | None, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in found.runs:
            # <model>/<variant>/source-<seed>, or <model>/<variant>/adapt-<shots>-<seed>/runs/<task>-<seed>
            variant = run.path.parents[2 if run.path.parent.name == RUNS else 0].name
            if run.stage == "source":
                self.sources[variant][run.seed] = run
            else:
                self.scored[variant][run.shots].append(run)

    @property
    def runs(self) -> list[Run]:
        of_sources = [run for by_seed in self.sources.values() for run in by_seed.values()]
        return of_sources + [run for by_shots in self.scored.values() for runs in by_shots.values() for run in runs]

    def variants(self, shots: int | None) -> list[str]:
        return [variant for variant, by_shots in self.scored.items() if shots in by_shots]

    def scores(self, variant: str, shots: int | None) -> Scores:
        found: Scores = defaultdict(dict)
        for run in self.scored[variant].get(shots, ()):
            for task, scores in run.tasks.items():
                found[task][run.seed] = scores["score"]
        return found

    def best_of(self, variants: Sequence[str], shots: int | None) -> Scores:
        """The test score of the variant whose best validation score is the highest, the first of equals."""
        picked: dict[tuple[str, int], tuple[float, float]] = {}
        for run in (run for variant in variants for run in self.scored[variant].get(shots, ())):
            ((task, scores),) = run.tasks.items()
            validation = max(line["validation"]["best"] for line in validations(run))
            if validation > picked.get((task, run.seed), (float("-inf"),))[0]:
                picked[task, run.seed] = validation, scores["score"]
        found: Scores = defaultdict(dict)
        for (task, seed), (_, score) in picked.items():
            found[task][seed] = score
        return found

    def check(self, budgets: Budgets) -> None:
        """Asserts that what is called equal is."""
        for steps, variants in budgets.steps.items():
            for name, run in self._sources_of(variants):
                assert last_step(run) == steps, f"{name}: {last_step(run)} source steps, not {steps}"
        for count, variants in budgets.row_passes.items():
            for name, run in self._sources_of(variants):
                passes = run.rows_processed[0]
                assert abs(passes - count) <= SAME * count, f"{name}: {passes} row passes, not {count}"
        for variant, by_shots in self.scored.items():
            for shots, runs in by_shots.items():
                places = {(task, run.seed) for run in runs for task in run.tasks}
                assert places == self._places(), f"{variant}, {shots} shots: other tasks or seeds than the rest"
                for run in runs:
                    passes, expected = run.rows_processed[1], target_passes(run)
                    assert passes == expected, f"{run.path}: {passes} row passes of the target stage, not {expected}"

    def _places(self) -> set[tuple[str, int]]:
        return {(task, run.seed) for run in self.runs for task in run.tasks}

    def _sources_of(self, variants: Sequence[str]) -> list[tuple[str, Run]]:
        return [(f"{name}, seed {seed}", run) for name in variants for seed, run in self.sources[name].items()]


def target_passes(run: Run) -> int:
    """What the recipe's target stage costs."""
    if run.stage == "zero_shot":
        return 0
    target, spot = run.config["target"], run.config["spot"]
    probe = (spot["probe_steps"] or target["steps"] // 10) if run.method == "spot" else 0
    return (target["steps"] + probe) * min(target["batch_size"], run.shots or sys.maxsize)


def last_step(run: Run) -> int:
    return max(line["step"] for line in run.lines)


def validations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_lines(run.path / METRICS) if "validation" in line]


def source_stage(run: Run) -> dict[str, Any]:
    """What a source stage cost, and what its prompts say of its own tasks' validation rows after the last step."""
    last = validations(run)[-1]
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


def all_scores(study: Study, budgets: Budgets) -> dict[int | None, dict[str, Scores]]:
    """By shots and variant."""
    found = {}
    for shots in sorted({shots for by_shots in study.scored.values() for shots in by_shots}, key=str):
        found[shots] = {variant: study.scores(variant, shots) for variant in study.variants(shots)}
        for name, variants in budgets.best_of.items():
            if scores := study.best_of(variants, shots):
                found[shots][name] = scores
    return found


def differences(scores: Mapping[int | None, Mapping[str, Scores]], baselines: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for shots, by_variant in scores.items():
        for baseline in (name for name in baselines if name in by_variant):
            for variant in (name for name in by_variant if name != baseline):
                difference = paired_difference(by_variant[variant], by_variant[baseline])
                found.append({"variant": variant, "baseline": baseline, "shots": shots, **difference._asdict()})
    return found


def collected(study: Study, budgets: Budgets) -> dict[str, Any]:
    first = study.runs[0]
    assert all(run.results["versions"] == first.results["versions"] for run in study.runs), "runs of several versions"
    tasks = {task: scores for run in study.runs for task, scores in run.tasks.items()}
    scores = all_scores(study, budgets)
    return {
        "date": date.today().isoformat(),
        "versions": first.results["versions"],
        "model": first.model,
        "seeds": sorted({run.seed for run in study.runs}),
        "tasks": {task: {key: scores[key] for key in ("metric", "majority", "rows")} for task, scores in tasks.items()},
        "sources": {
            name: {seed: source_stage(run) for seed, run in runs.items()} for name, runs in study.sources.items()
        },
        "scores": scores,
        "recipes": {name: recipe_of(next(iter(runs.values()))) for name, runs in study.sources.items()},
        "differences": differences(scores, budgets.baselines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("folder", type=Path, help="--out of bmtpt scale")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    study, budgets = Study(arguments.folder), STUDIES[arguments.study]
    study.check(budgets)
    found = collected(study, budgets)
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found["differences"]))


if __name__ == "__main__":
    main()
