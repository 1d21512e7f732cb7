"""The command line: what it imports, and a whole tiny run whose files are what DESIGN section 6 promises to others."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score

import bmtpt_ds
from bmtpt_ds.cli import main
from bmtpt_ds.config import Recipe, load_recipe
from bmtpt_ds.data.splits import load_task
from bmtpt_ds.tasks import get_task
from tests import toy

STEPS = ["--set", "source.steps=7", "--set", "target.steps=7", "--set", "run.log_every=3"]
RESULT_KEYS = [
    "method", "model", "seed", "shots", "split", "rows_processed", "trainable_parameters", "versions", "tasks", "mean",
]  # fmt: skip


@pytest.mark.parametrize(
    "module", ["", ".config", ".config.deepspeed_json", ".tasks", ".cli", ".data.order", ".schedule"]
)
def test_what_a_login_node_needs_imports_nothing_heavy(module: str) -> None:
    heavy = ("torch", "deepspeed", "transformers", "datasets", "matplotlib", "peft", "triton", "mpi4py", "sklearn")
    code = f"import sys, bmtpt_ds{module}; print(*[m for m in {heavy} if m in sys.modules])"
    root = Path(bmtpt_ds.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_librarys_thread_at_work_when_all_is_done_changes_no_status() -> None:
    """Where Python takes itself down, the thread comes back from the store, finds none and aborts the process."""
    code = """
import atexit, threading, time, torch
from bmtpt_ds import cli

store = torch.distributed.HashStore()
def beat():
    while True:
        store.add("beats", 1)

atexit.register(print, "said at the end")
threading.Thread(target=beat, daemon=True).start()
time.sleep(0.1)
cli.main = lambda: 0
cli.program()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "said at the end\n", "")


# --- a whole run -----------------------------------------------------------------------------------------------------


class Tiny(NamedTuple):
    """A finished run of each stage, seven steps; to read only."""

    folder: Path
    source: Path
    adapt: Path
    recipe: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, untied_model, rows) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    recipe = folder / "recipe.yaml"
    recipe.write_text(toy.recipe_text(untied_model, rows))
    source, adapt = folder / "runs/source", folder / "runs/adapt"
    common = ["--config", str(recipe), *STEPS]
    assert main(["source", *common, "--run-dir", str(source)]) == 0
    assert main(["adapt", *common, "--run-dir", str(adapt), "--particles", str(source)]) == 0
    return Tiny(folder, source, adapt, recipe)


def evaluated(run: Path, folder: Path, *arguments: str) -> tuple[dict, list[dict]]:
    """The scores and the predictions that `evaluate` writes."""
    scores, predictions = folder / "scores.json", folder / "predictions.jsonl"
    files = ["--json", str(scores), "--predictions", str(predictions)]
    assert main(["evaluate", "--prompt", str(run), *files, *arguments]) == 0
    return json.loads(scores.read_text()), [json.loads(line) for line in predictions.read_text().splitlines()]


def lines_of(run: Path, kind: Callable[[dict], bool]) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind(line)]


def answers(name: str, split: str, root: Path) -> list[int]:
    return [row["label"] for row in getattr(load_task(get_task(name), root=str(root)), split)]


def majority(name: str, split: str, root: Path) -> float:
    """Accuracy, 0 to 100, of scikit-learn's way of always answering the most frequent label."""
    true = answers(name, split, root)
    nothing = np.zeros((len(true), 1))
    return 100 * DummyClassifier(strategy="most_frequent").fit(nothing, true).score(nothing, true)


def test_the_run_directories_hold_what_they_should_and_nothing_else(tiny: Tiny) -> None:
    both = {".lock", "config.yaml", "metrics.jsonl", "results.json", "checkpoints", "tensorboard"}
    assert {path.name for path in tiny.source.iterdir()} == both | {"particles.safetensors"}
    assert {path.name for path in tiny.adapt.iterdir()} == both | {"prompt.safetensors"}
    for run in (tiny.source, tiny.adapt):
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert kept == ["step-00000006.safetensors", "step-00000007.safetensors"]  # `keep` is 2
    assert {path.name for path in tiny.folder.iterdir()} == {"recipe.yaml", "runs"}


def test_config_yaml_is_the_whole_resolved_recipe(tiny: Tiny) -> None:
    recipe = load_recipe(str(tiny.recipe), STEPS[1::2])
    for run, stage in ((tiny.source, "source"), (tiny.adapt, "adapt")):
        written = yaml.safe_load((run / "config.yaml").read_text())
        assert written.pop("stage") == stage
        assert written.pop("particles", None) == (str(tiny.source) if stage == "adapt" else None)
        assert Recipe(**written) == recipe
        assert all(set(written[s]) == set(type(getattr(recipe, s)).model_fields) for s in written if s != "method")


def test_tensors(tiny: Tiny) -> None:
    particles = load_file(tiny.source / "particles.safetensors")
    assert {name: t.shape for name, t in particles.items()} == {"particles": (3, 5, 32)}
    prompt = load_file(tiny.adapt / "prompt.safetensors")
    assert {name: t.shape for name, t in prompt.items()} == {"full": (5, 32), "mrpc.a": (5,), "mrpc.b": (32,)}
    for tensor in [*particles.values(), *prompt.values()]:
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
    assert len({p.numpy().tobytes() for p in particles["particles"]}) == 3


def test_metrics(tiny: Tiny) -> None:
    lines = lines_of(tiny.source, lambda line: True)
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    promised = {"step", "loss", "losses", "bandwidth", "damping", "kernel_mean", "drive_norm", "repulsion_norm"}
    for line in lines:
        assert promised | {"lr", "seconds", "skipped"} <= set(line)
        assert any(key.startswith("seconds_") for key in line)
        assert len(line["losses"]) == 3
        assert line["loss"] == pytest.approx(sum(line["losses"]) / 3, rel=1e-5)
        assert sum(v for k, v in line.items() if k.startswith("seconds_")) <= line["seconds"] * 1.01 + 1e-4
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0]

    trained = lines_of(tiny.adapt, lambda line: "validation" not in line)
    assert [line["step"] for line in trained] == [1, 3, 6, 7]
    assert all({"step", "loss", "prior", "lr_full", "lr_low_rank", "skipped", "seconds"} <= set(t) for t in trained)
    validated = lines_of(tiny.adapt, lambda line: "validation" in line)
    assert [line["step"] for line in validated] == [3, 6, 7]  # every eval_every, and the last
    for line in validated:
        assert {"prior_gradient_ratio", "relative_distance"} <= set(line)
        assert 0 <= line["validation"]["mrpc"] <= line["validation"]["best"] <= 100


def test_tensorboard_has_the_same_numbers(tiny: Tiny) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for run, title in ((tiny.source, "source"), (tiny.adapt, "adapt")):
        board = events.EventAccumulator(str(run / "tensorboard"))
        board.Reload()
        lines = lines_of(run, lambda line: "loss" in line)
        seen = {event.step: event.value for event in board.Scalars(f"{title}/loss")}
        assert seen == pytest.approx({line["step"]: line["loss"] for line in lines})


def test_a_run_leaves_no_thread_of_tensorboards(recipe: Path, tmp_path: Path) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboard")}

    before = threads()
    assert main(["source", "--config", str(recipe), "--set", "source.steps=2", "--run-dir", str(tmp_path / "run")]) == 0
    assert threads() <= before


def test_results_of_the_source_stage(tiny: Tiny, untied_model: Path) -> None:
    results = json.loads((tiny.source / "results.json").read_text())
    assert list(results) == RESULT_KEYS
    assert results["method"] == "bmtpt"
    assert results["model"] == str(untied_model)
    assert (results["seed"], results["shots"], results["split"]) == (0, None, None)
    assert results["rows_processed"] == {"source": 7 * 3 * 2 * 2, "target": 0}  # steps, particles, tasks, rows
    assert results["trainable_parameters"] == 3 * 5 * 32
    assert (results["tasks"], results["mean"]) == ({}, None)
    assert {"bmtpt_ds", "torch", "deepspeed", "transformers"} <= set(results["versions"])


def test_results_of_the_target_stage(tiny: Tiny, rows: Path) -> None:
    results = json.loads((tiny.adapt / "results.json").read_text())
    assert list(results) == RESULT_KEYS
    assert (results["shots"], results["split"]) == (8, "test")
    assert results["rows_processed"] == {"source": 7 * 3 * 2 * 2, "target": 7 * 4}
    assert results["trainable_parameters"] == 5 * 32 + 5 + 32
    (name,) = results["tasks"]
    task = results["tasks"][name]
    assert list(task) == ["metric", "score", "metrics", "majority", "rows"]
    assert (name, task["metric"], list(task["metrics"])) == ("mrpc", "accuracy", ["accuracy", "f1"])
    assert task["rows"] == len(answers("mrpc", "test", rows)) == 15
    assert task["score"] == task["metrics"]["accuracy"] == results["mean"]
    assert all(0 <= value <= 100 for value in task["metrics"].values())
    assert task["majority"] == pytest.approx(majority("mrpc", "test", rows))


def test_evaluate_gives_the_runs_own_test_score(tiny: Tiny, tmp_path: Path, rows: Path, capsys) -> None:
    scores, predictions = evaluated(tiny.adapt, tmp_path)
    assert scores == json.loads((tiny.adapt / "results.json").read_text())
    assert list(scores) == RESULT_KEYS
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "test"
    assert line.split()[:2] == ["mrpc", "15"]
    assert f"accuracy {scores['mean']:.1f}" in line
    assert [set(p) for p in predictions] == [{"task", "source", "target", "prediction"}] * 15
    assert [int(p["target"]) for p in predictions] == answers("mrpc", "test", rows)
    right = [p["prediction"].strip() == p["target"] for p in predictions]
    assert scores["mean"] == pytest.approx(100 * np.mean(right))


def test_evaluate_on_the_validation_rows_by_the_likeliest_label(tiny: Tiny, tmp_path: Path, rows: Path) -> None:
    chosen = ["--split", "validation", "--set", "evaluate.scoring=labels"]
    scores, predictions = evaluated(tiny.adapt, tmp_path, *chosen)
    true = answers("mrpc", "validation", rows)
    assert [int(p["target"]) for p in predictions] == true
    said = [int(p["prediction"]) for p in predictions]  # always a label
    assert set(said) <= {0, 1}
    task = scores["tasks"]["mrpc"]
    assert scores["split"] == "validation"
    assert task["metrics"]["accuracy"] == pytest.approx(100 * accuracy_score(true, said))
    assert task["metrics"]["f1"] == pytest.approx(100 * f1_score(true, said, zero_division=0))
    assert task["majority"] == pytest.approx(majority("mrpc", "validation", rows))


def test_the_best_validation_is_that_of_the_prompt_that_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    scores, _ = evaluated(tiny.adapt, tmp_path, "--split", "validation")
    best = lines_of(tiny.adapt, lambda line: "validation" in line)[-1]["validation"]["best"]
    assert scores["mean"] == pytest.approx(best)


def test_the_particles_mean_is_scored_without_adaptation(tiny: Tiny, tmp_path: Path, rows: Path) -> None:
    own, _ = evaluated(tiny.source, tmp_path)
    assert list(own["tasks"]) == ["sst2", "cola"]
    assert own["shots"] is None  # trained on their rows
    assert own["mean"] == pytest.approx(np.mean([task["score"] for task in own["tasks"].values()]))
    assert set(own["tasks"]["cola"]["metrics"]) == {"accuracy", "matthews"}

    both, _ = evaluated(tiny.source, tmp_path, "--task", "sst2", "mrpc")
    assert both["shots"] is None

    zero, predictions = evaluated(tiny.source, tmp_path, "--task", "mrpc", "rte", "--set", "evaluate.scoring=labels")
    assert list(zero) == RESULT_KEYS
    assert list(zero["tasks"]) == ["mrpc", "rte"]
    assert (zero["shots"], zero["rows_processed"]["target"]) == (0, 0)
    assert [p["task"] for p in predictions] == ["mrpc"] * 15 + ["rte"] * 15
    for name, task in zero["tasks"].items():
        assert task["majority"] == pytest.approx(majority(name, "test", rows))


def test_a_finished_run_is_left_as_it_is_by_resume(tiny: Tiny, capsys) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tiny.source.rglob("*") if path.is_file()}

    before = contents()
    command = ["source", "--config", str(tiny.recipe), *STEPS, "--run-dir", str(tiny.source), "--resume"]
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().err
    assert contents() == before


def test_overwrite_gives_the_same_particles_again_and_spares_other_files(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny.source, run)
    (run / "notes.txt").write_text("mine")
    (run / "particles.safetensors").unlink()
    assert main(["source", "--config", str(tiny.recipe), *STEPS, "--run-dir", str(run), "--overwrite"]) == 0
    particles = [load_file(folder / "particles.safetensors")["particles"] for folder in (run, tiny.source)]
    assert torch.equal(*particles)
    assert [line["step"] for line in lines_of(run, lambda line: True)] == [1, 3, 6, 7]
    assert (run / "notes.txt").read_text() == "mine"
