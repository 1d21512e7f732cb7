"""The paper's recipes on the real T5 and real rows, ZeRO-3 on two ranks: a task of each family, and several at once.

Shorter in all that only costs time: steps, prompt, rows to validate and test on, the source stage's texts.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import launch

pytestmark = [pytest.mark.shared, pytest.mark.slow]

SOURCES = ("mnli", "qnli", "qqp", "sst2", "squad", "record")
SUPERGLUE = ("multirc", "boolq", "wic", "wsc", "cb")
# name of the run: recipe, targets
ADAPTATIONS = {
    "GLUE": ("table1/single", ("stsb",)),
    "few": ("table2/shots_16", ("cola",)),
    "SuperGLUE": ("table1/single", ("cb",)),
    "MRQA": ("table4/mrqa", ("nq",)),
    "others": ("table4/others", ("winogrande",)),
    "multi": ("table1/multi_superglue", SUPERGLUE),
}
METRICS = {
    "stsb": ["pearson", "spearman"],
    "cola": ["accuracy", "matthews"],
    "cb": ["accuracy", "macro_f1"],
    "nq": ["f1", "exact_match"],
    "winogrande": ["accuracy"],
    "multirc": ["f1a", "exact_match"],
    "boolq": ["accuracy"],
    "wic": ["accuracy"],
    "wsc": ["accuracy"],
}
SETTINGS = ("prompt.length=20", "run.log_every=4")
SOURCE = ("source.steps=24", "source.warmup_steps=2", "model.max_source_length=48")
TARGET = ("target.steps=24", "target.warmup_steps=2", "target.eval_every=12", "target.batch_size=8")
ROWS = 40  # of a validation file


class Run(NamedTuple):
    log: list[dict]
    results: dict
    said: str


@pytest.fixture(scope="module")
def runs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("paper")
    data = folder / "data"
    for task in {*SOURCES, *(task for _, tasks in ADAPTATIONS.values() for task in tasks)}:
        (data / task).mkdir(parents=True)
        for split, rows in (("train", None), ("validation", ROWS)):
            lines = (shared / "data" / task / f"{split}.jsonl").read_text().splitlines()
            every = len(lines) // rows if rows and len(lines) > rows else 1  # of multirc from many paragraphs
            (data / task / f"{split}.jsonl").write_text("\n".join(lines[::every][:rows]) + "\n")
    model = shared / "models" / "flan-t5-small-titles"
    common = (f"model.name_or_path={model}", f"data.root={data}", *SETTINGS)

    def command(stage: str, recipe: str, name: str, settings: tuple[str, ...], *more: object) -> list[object]:
        chosen = [part for setting in (*common, *settings) for part in ("--set", setting)]
        where = ("--run-dir", folder / name, "--deepspeed_config", "zero3_cpu")
        return [stage, "--config", recipe, *chosen, *where, *more]

    commands = {"source": command("source", "paper", "source", SOURCE)}
    for name, (recipe, tasks) in ADAPTATIONS.items():
        settings = (*TARGET, f"target.tasks=[{', '.join(tasks)}]")
        commands[name] = command("adapt", recipe, name, settings, "--particles", folder / "source")
    seen = launch.run_commands(list(commands.values()), folder / "job", ranks=2, seconds=2400)
    assert [s["status"] for s in seen] == [0] * len(commands)

    def run(name: str, said: str) -> Run:
        log = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return Run(log, json.loads((folder / name / "results.json").read_text()), said)

    return {name: run(name, s["stderr"]) for name, s in zip(commands, seen, strict=True)}


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.log if "loss" in line]


@pytest.mark.parametrize("name", ["source", *ADAPTATIONS])
def test_losses_fall_and_no_step_is_skipped(runs: dict[str, Run], name: str) -> None:
    found = losses(runs[name])
    assert len(found) == 7  # steps 1, 4, 8, ... 24
    assert min(found[-2:]) < found[0]
    assert all(line["skipped"] == 0 for line in runs[name].log if "loss" in line)


def test_the_source_stage_reads_30_rows_a_step(runs: dict[str, Run]) -> None:
    assert runs["source"].results["rows_processed"] == {"source": 24 * 30, "target": 0}
    said = runs["source"].said
    assert all(re.search(rf"\b{task} [\d,]+ \+ [\d,]+ \+ [\d,]+", said) for task in SOURCES)
    cut = next(line for line in said.splitlines() if line.startswith("cut to model.max_source_length"))
    assert all(re.search(rf"{task} \d+\.\d% \(to 48 tokens\)", cut) for task in ("squad", "record"))


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_every_target_has_scores_of_its_own_metrics(runs: dict[str, Run], name: str) -> None:
    results, (_, tasks) = runs[name].results, ADAPTATIONS[name]
    assert list(results["tasks"]) == list(tasks)
    for task, scores in results["tasks"].items():
        assert list(scores["metrics"]) == METRICS[task]
        assert scores["metric"] == METRICS[task][0]
        least = -100 if task in ("stsb", "cola") else 0
        assert all(least <= value <= 100 for value in scores["metrics"].values())
        assert 0 < scores["rows"] <= ROWS
    assert results["mean"] == pytest.approx(sum(s["score"] for s in results["tasks"].values()) / len(tasks))
    seeds = 3 if name == "few" else 1  # side by side
    assert results["trainable_parameters"] == seeds * (20 * 512 + len(tasks) * (20 + 512))
    assert results["rows_processed"] == {"source": 24 * 30, "target": seeds * 24 * 8}
    assert results["shots"] == (16 if name == "few" else None)


def test_several_targets_are_validated_each_by_itself(runs: dict[str, Run]) -> None:
    lines = [line["validation"] for line in runs["multi"].log if "validation" in line]
    assert len(lines) == 2
    assert all(list(line) == [*SUPERGLUE, "mean", "best", "best_step"] for line in lines)
    assert lines[-1]["best"] == max(line["mean"] for line in lines)
    assert "5 prompts of 20 x 512 with one W, 2,580 parameters a task" in runs["multi"].said
