"""Every method behind the commands: source, adapt, resume, evaluate, predict, and what they leave."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmtpt_ds.cli import main
from tests import toy

SHARED_ROWS = {"vanilla_transfer": 1, "spot": 1, "attempt": 1, "mpt": 3}  # times the rows of a step, K = kappa
NO_SOURCE = ["prompt_tuning", "lora", "adapter", "bitfit", "fine_tuning"]
METHODS = [*SHARED_ROWS, *NO_SOURCE]
WEIGHTS = NO_SOURCE[1:]


class Runs:
    """A source stage and an adaptation of each method on the tiny model, made when they are asked for."""

    def __init__(self, folder: Path, model: Path, rows: Path):
        self.folder, self.recipe = folder, folder / "recipe.yaml"
        self.recipe.write_text(toy.recipe_text(model, rows) + "spot: {probe_steps: 2}\nmpt: {teacher_steps: 4}\n")

    def source(self, method: str) -> Path:
        run = self.folder / f"source-{method}"
        if not run.exists():
            assert main(["source", *self._recipe(method), "--run-dir", str(run)]) == 0
        return run

    def adapt_command(self, method: str, run: Path, *more: str) -> list[str]:
        particles = "none" if method in NO_SOURCE else str(self.source(method))
        return ["adapt", *self._recipe(method), "--particles", particles, "--run-dir", str(run), *more]

    def adapted(self, method: str) -> Path:
        run = self.folder / f"adapt-{method}"
        if not run.exists():
            assert main(self.adapt_command(method, run)) == 0
        return run

    def _recipe(self, method: str) -> list[str]:
        return ["--config", str(self.recipe), "--set", f"method={method}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, untied_model: Path, rows: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("methods"), untied_model, rows)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_results_say_what_was_trained_and_read(made: Runs, method: str) -> None:
    run = made.adapted(method)
    found = results(run)
    source = 6 * 4 * SHARED_ROWS.get(method, 0)  # 6 steps of 2 tasks x 2 rows
    source -= (6 - 4) * 4 * (method == "mpt")  # its teachers' steps are 4
    probe = 2 * 4 * (method == "spot")
    assert found["rows_processed"] == {"source": source, "target": 6 * 4 + probe}
    assert (found["method"], found["seed"], list(found["tasks"])) == (method, 0, ["mrpc"])
    size, prompt = 0, 5 * 32
    if method in WEIGHTS:
        size = sum(tensor.numel() for tensor in load_file(run / "prompt.safetensors").values())
    elif method == "attempt":
        size = prompt + 2 * 32 * 100 + 2 * 32
    else:
        size = prompt + (5 + 32) * (method == "mpt")
    assert found["trainable_parameters"] == size


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_and_predict_answer_as_the_run_did(made: Runs, tmp_path: Path, method: str, capsys) -> None:
    run, out, told = made.adapted(method), tmp_path / "scores.json", tmp_path / "answers.jsonl"
    sizes = ["--set", "weights.rank=2", "--set", "weights.reduction=4"]  # the run's own count
    assert main(["evaluate", "--prompt", str(run), "--json", str(out), "--predictions", str(told), *sizes]) == 0
    assert json.loads(out.read_text()) == results(run)
    assert {line["prediction"] for line in map(json.loads, told.read_text().splitlines())}


@pytest.mark.parametrize("stage", ["source", "adapt"])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_from_the_middle_it_ends_the_same(made: Runs, tmp_path: Path, method: str, stage: str) -> None:
    if stage == "source" and method in NO_SOURCE:
        pytest.skip("no source stage")
    whole = made.source(method) if stage == "source" else made.adapted(method)
    command = ["source", *made._recipe(method)] if stage == "source" else made.adapt_command(method, tmp_path)[:-2]
    run, outcome = tmp_path / "run", "particles.safetensors" if stage == "source" else "prompt.safetensors"
    shutil.copytree(whole, run)
    for name in ("results.json", outcome, "checkpoints/step-00000006.safetensors"):
        (run / name).unlink()
    for last in run.glob("*/checkpoints/step-*.safetensors"):  # of teachers and probe: all but the first
        if last.name > "step-00000002":
            last.unlink()
    if command[0] == "adapt":
        command = made.adapt_command(method, run)
    else:
        command += ["--run-dir", str(run)]
    assert main([*command, "--resume"]) == 0
    right, found = (load_file(folder / outcome) for folder in (whole, run))
    assert right.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())
    assert results(run) == results(whole)
