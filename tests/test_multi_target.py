"""Several targets in one run: one W, an a and b a task, each task scored by its own metrics, the best by their mean."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bmtpt_ds.cli import main
from tests import launch, toy
from tests.tasks import squad_evaluation

TASKS = ["cola", "prices", "mrpc", "echoes"]  # labels, numbers, labels of other metrics, free text
OWN = """
  tasks:
    prices: {{folder: {folder}, source: [text], target: price, metrics: [pearson, spearman]}}
    echoes: {{folder: {folder}, source: [text], target: words}}
"""


class Finished(NamedTuple):
    recipe: Path
    run: Path
    results: dict
    predictions: dict[str, list[dict]]  # of the test rows, by task


def command(recipe: Path, run: Path, *more: str) -> list[str]:
    return ["adapt", "--config", str(recipe), "--particles", "none", "--run-dir", str(run), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, untied_model: Path, rows: Path) -> Finished:
    folder = tmp_path_factory.mktemp("multi")
    files = folder / "files"
    files.mkdir()
    for split, count in (("train", 9), ("validation", 8), ("test", 7)):
        words = ["good", "bad", "fine"]
        lines = [{"text": f"{words[i % 3]} film", "price": str(i % 3), "words": words[i % 3]} for i in range(count)]
        (files / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    text = toy.recipe_text(untied_model, rows).replace("[mrpc], shots: 8", f"[{', '.join(TASKS)}], multi: true")
    text = text.replace(f"data: {{root: {rows}}}", f"data:\n  root: {rows}{OWN.format(folder=files)}")
    recipe, run = folder / "recipe.yaml", folder / "run"
    recipe.write_text(text.replace("log_every: 2", "keep: 9, log_every: 2").replace("batch_size: 4", "batch_size: 10"))
    assert main(command(recipe, run)) == 0
    said = folder / "predictions"
    scores = folder / "scores.json"
    assert main(["evaluate", "--prompt", str(run), "--predictions", str(said), "--json", str(scores)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert json.loads(scores.read_text()) == results
    predictions = [json.loads(line) for line in said.read_text().splitlines()]
    by_task = {task: [p for p in predictions if p["task"] == task] for task in TASKS}
    return Finished(recipe, run, results, by_task)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validations(run: Path) -> list[dict]:
    return [line for line in log(run) if "validation" in line]


def test_one_w_and_an_a_and_b_a_task(finished: Finished) -> None:
    prompt = load_file(finished.run / "prompt.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in prompt.items()} == {
        "full": (5, 32),
        **{f"{task}.a": (5,) for task in TASKS},
        **{f"{task}.b": (32,) for task in TASKS},
    }
    assert finished.results["trainable_parameters"] / len(TASKS) == 5 * 32 / len(TASKS) + 5 + 32
    for name in ("a", "b"):  # each learned from its own rows
        found = [prompt[f"{task}.{name}"] for task in TASKS]
        assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


def test_each_task_is_scored_by_its_own_metrics(finished: Finished) -> None:
    """Not all of them by the first one's, as a predecessor's code does."""
    scores = finished.results["tasks"]
    assert list(scores) == TASKS
    metrics = {name: (task["metric"], list(task["metrics"])) for name, task in scores.items()}
    assert metrics == {
        "cola": ("accuracy", ["accuracy", "matthews"]),
        "prices": ("pearson", ["pearson", "spearman"]),
        "mrpc": ("accuracy", ["accuracy", "f1"]),
        "echoes": ("exact_match", ["exact_match", "f1"]),
    }
    assert {name: task["rows"] for name, task in scores.items()} == {"cola": 15, "prices": 7, "mrpc": 15, "echoes": 7}
    assert finished.results["mean"] == pytest.approx(sum(task["score"] for task in scores.values()) / 4)


def test_the_scores_are_those_of_the_predictions(finished: Finished) -> None:
    scores = {name: task["metrics"] for name, task in finished.results["tasks"].items()}
    true = {name: [p["target"] for p in said] for name, said in finished.predictions.items()}
    said = {name: [p["prediction"].strip() for p in said] for name, said in finished.predictions.items()}
    wrong = {name: {"0": "1", "1": "0"} for name in ("cola", "mrpc")}
    for name in wrong:  # what is no label counts as the wrong one
        said[name] = [s if s in ("0", "1") else wrong[name][t] for s, t in zip(said[name], true[name], strict=True)]
        assert scores[name]["accuracy"] == pytest.approx(100 * accuracy_score(true[name], said[name]))
    assert scores["cola"]["matthews"] == pytest.approx(100 * matthews_corrcoef(true["cola"], said["cola"]))
    assert scores["mrpc"]["f1"] == pytest.approx(100 * f1_score(true["mrpc"], said["mrpc"], pos_label="1"))
    numbers = [float(t) for t in true["prices"]]
    read = [
        float(s) if s in ("0", "1", "2") else 2.0 - (t > 0) * 2.0 for s, t in zip(said["prices"], numbers, strict=True)
    ]
    constant = len(set(read)) == 1
    assert scores["prices"]["pearson"] == pytest.approx(0 if constant else 100 * pearsonr(numbers, read).statistic)
    expected = squad_evaluation.evaluate([(t,) for t in true["echoes"]], said["echoes"])
    assert scores["echoes"] == pytest.approx({name: expected[name] for name in ("exact_match", "f1")})


def test_the_best_by_the_mean_is_kept(finished: Finished, tmp_path: Path) -> None:
    lines = validations(finished.run)
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        values = line["validation"]
        assert list(values) == [*TASKS, "mean", "best", "best_step"]
        assert values["mean"] == pytest.approx(sum(values[task] for task in TASKS) / 4)
        assert list(line["relative_distance"]) == TASKS
    last = lines[-1]["validation"]
    means = [line["validation"]["mean"] for line in lines]
    assert (last["best"], last["best_step"]) == (max(means), [3, 6][means.index(max(means))])
    checkpoint = load_file(finished.run / "checkpoints" / f"step-{last['best_step']:08d}.safetensors")
    prompt = load_file(finished.run / "prompt.safetensors")
    assert torch.equal(prompt["full"], checkpoint["tuned.full"][0])
    for k, task in enumerate(TASKS):
        assert torch.equal(prompt[f"{task}.a"], checkpoint["tuned.a"][0, k])
        assert torch.equal(prompt[f"{task}.b"], checkpoint["tuned.b"][0, k])
    kept = tmp_path / "validation.json"
    assert main(["evaluate", "--prompt", str(finished.run), "--split", "validation", "--json", str(kept)]) == 0
    assert json.loads(kept.read_text())["mean"] == pytest.approx(max(means))


def test_losses_of_the_tasks_are_in_the_log(finished: Finished) -> None:
    lines = [line for line in log(finished.run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    for line in lines:
        assert list(line["task_losses"]) == TASKS
        known = [loss for loss in line["task_losses"].values() if loss is not None]  # null: none of its rows was drawn
        assert known and min(known) <= line["loss"] <= max(known)


def test_the_prompt_of_a_task_answers_its_rows_alone(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "mrpc.json"
    assert main(["evaluate", "--prompt", str(finished.run), "--task", "mrpc", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["tasks"] == {"mrpc": finished.results["tasks"]["mrpc"]}


def test_resumed_from_the_middle_it_ends_the_same(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    for name in ("results.json", "prompt.safetensors", "checkpoints/step-00000006.safetensors"):
        (run / name).unlink()
    assert main(command(finished.recipe, run, "--resume")) == 0
    right, found = (load_file(folder / "prompt.safetensors") for folder in (finished.run, run))
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())
    assert json.loads((run / "results.json").read_text()) == finished.results
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith(launch.COSTS)} for line in log(r)]
        for r in (finished.run, run)
    ]
    assert timeless[0] == timeless[1]


def test_what_a_run_says(finished: Finished, tmp_path: Path, capsys) -> None:
    assert main(command(finished.recipe, tmp_path / "run", "--set", "target.steps=2")) == 0
    said = capsys.readouterr().err
    assert "2 steps, 4 prompts of 5 x 32 with one W, 77 parameters a task" in said  # 5 * 32 / 4 + 5 + 32
    assert "cola 60 + 15 + 15, prices 9 + 8 + 7, mrpc 60 + 15 + 15, echoes 9 + 8 + 7" in said
    assert "mean" in next(line for line in said.splitlines() if "validation: cola" in line)
