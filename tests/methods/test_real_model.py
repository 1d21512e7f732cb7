"""Every method on the real T5 and real rows: losses fall in tens of steps, a run broken off ends the same, a report."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmtpt_ds.cli import main
from tests.real_rows import copy_rows

STEPS = 30
SETTINGS = (
    "model.max_source_length=48",
    "data.labels=words",  # each task's own: of digits the source stages leave the adaptations nothing to learn
    "source.particles=2",
    f"source.steps={STEPS}",
    "source.warmup_steps=3",
    f"target.steps={STEPS}",
    "target.batch_size=8",
    "target.warmup_steps=3",
    "target.eval_every=15",
    "evaluate.scoring=labels",
    "run.log_every=5",
    "run.save_every=10",
)
# method: whose source stage its adaptation begins at
METHODS = {
    "bmtpt": "bmtpt",
    "prompt_tuning": None,
    "vanilla_transfer": "vanilla_transfer",
    "spot": "spot",
    "attempt": "spot",
    "mpt": "mpt",
    "lora": None,
    "adapter": None,
    "bitfit": None,
    "fine_tuning": None,
}
RATES = {"bitfit": "weights.lr=0.01", "adapter": "weights.lr=0.001", "lora": "weights.lr=0.003"}  # for so few steps

pytestmark = [pytest.mark.shared, pytest.mark.slow]


class Runs:
    """Runs of the methods, made when they are asked for."""

    def __init__(self, shared: Path, folder: Path):
        self.folder, data = folder, copy_rows(shared, folder / "data", ("sst2", "rte", "cola", "mrpc"))
        model = shared / "models" / "flan-t5-small-titles"
        self.settings = [f"model.name_or_path={model}", f"data.root={data}", *SETTINGS]

    def command(self, stage: str, method: str, run: Path) -> list[str]:
        settings = [*self.settings, f"method={method}", *([RATES[method]] if method in RATES else [])]
        words = [stage, "--config", "first_run", *(word for setting in settings for word in ("--set", setting))]
        if stage == "adapt":
            source = METHODS[method]
            words += ["--particles", str(self.of("source", source)) if source else "none"]
        return [*words, "--run-dir", str(run)]

    def of(self, stage: str, method: str) -> Path:
        run = self.folder / f"{stage}-{method}"
        if not run.exists():
            assert main(self.command(stage, method, run)) == 0
        return run


@pytest.fixture(scope="module")
def runs(shared: Path, tmp_path_factory) -> Runs:
    return Runs(shared, tmp_path_factory.mktemp("real methods"))


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


STAGES = [("adapt", method) for method in METHODS]
STAGES += [("source", method) for method in dict.fromkeys(filter(None, METHODS.values()))]


@pytest.mark.parametrize(("stage", "method"), STAGES)
def test_the_loss_falls(runs: Runs, stage: str, method: str) -> None:
    found = losses(runs.of(stage, method))
    assert found[-1] < 0.8 * found[0]


@pytest.mark.parametrize(("stage", "method"), STAGES)
def test_broken_off_and_resumed_it_ends_the_same(runs: Runs, tmp_path: Path, stage: str, method: str) -> None:
    whole, run = runs.of(stage, method), tmp_path / "run"
    shutil.copytree(whole, run)
    outcome = "particles.safetensors" if stage == "source" else "prompt.safetensors"
    for name in ("results.json", outcome, f"checkpoints/step-{STEPS:08d}.safetensors"):
        (run / name).unlink()
    assert main([*runs.command(stage, method, run), "--resume"]) == 0
    right, found = (load_file(folder / outcome) for folder in (whole, run))
    assert right.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_they_stand_beside_each_other_in_the_report(runs: Runs, tmp_path: Path, capsys) -> None:
    folders = [runs.of(stage, method) for stage, method in STAGES]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "report")]) == 0
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").open()))
    assert {row["method"] for row in rows if row["from"] == "ours"} == set(METHODS)
