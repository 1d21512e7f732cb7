"""Runs of several seeds and tasks in one job: each ends as it does alone, and its directory is that of a run."""

import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from bmtpt_ds.cli import main
from bmtpt_ds.config import load_recipe
from tests import launch, toy

TASKS, SEEDS = ["mrpc", "cola"], [0, 3]
NAMES = [f"{task}-{seed}" for task in TASKS for seed in SEEDS]
TOGETHER = ["--set", f"target.tasks=[{', '.join(TASKS)}]", "--set", f"target.seeds={SEEDS}"]


class Trained(NamedTuple):
    recipe: Path
    job: Path  # of all runs
    alone: dict[str, Path]  # the same runs, each in a job of its own

    def command(self, run_dir: Path, *more: str) -> list[str]:
        particles = ["--particles", "none"]  # so that a seed's prompt begins where the seed says
        return ["adapt", "--config", str(self.recipe), *particles, "--run-dir", str(run_dir), *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, untied_model: Path, rows: Path) -> Trained:
    folder = tmp_path_factory.mktemp("side by side")
    recipe = folder / "recipe.yaml"
    # sgd: Adam's first steps divide rounding by itself
    text = toy.recipe_text(untied_model, rows).replace("eval_every: 3", "eval_every: 3, optimizer: sgd, lr_full: 3.0")
    recipe.write_text(text)
    found = Trained(recipe, folder / "job", {name: folder / name for name in NAMES})
    assert main(found.command(found.job, *TOGETHER)) == 0
    for name, run in found.alone.items():
        task, seed = name.split("-")
        assert main(found.command(run, "--set", f"target.tasks=[{task}]", "--set", f"run.seed={seed}")) == 0
    return found


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_run_alone(trained: Trained, name: str) -> None:
    own, alone = trained.job / "runs" / name, trained.alone[name]
    prompts = [load_file(folder / "prompt.safetensors") for folder in (own, alone)]
    assert prompts[0].keys() == prompts[1].keys()
    for part, tensor in prompts[1].items():
        torch.testing.assert_close(prompts[0][part], tensor, rtol=1e-4, atol=1e-5)
    assert results(own) == results(alone)
    shared = {"imbalance"}  # of the whole job's passes, as its times are
    for line, expected in zip(log(own), log(alone), strict=True):
        wanted = {k: v for k, v in expected.items() if k not in shared and not k.startswith(launch.COSTS)}
        assert line.keys() == wanted.keys()
        for key, value in wanted.items():
            assert line[key] == pytest.approx(value, rel=1e-4), key


def test_runs_differ(trained: Trained) -> None:
    """Tasks, rows and starts are their own."""
    prompts = [load_file(trained.job / "runs" / name / "prompt.safetensors")["full"] for name in NAMES]
    assert not any(torch.equal(one, other) for i, one in enumerate(prompts) for other in prompts[:i])
    losses = [log(trained.job / "runs" / name)[0]["loss"] for name in NAMES]
    assert len(set(losses)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_is_that_of_a_run(trained: Trained, tmp_path: Path, name: str) -> None:
    own, (task, seed) = trained.job / "runs" / name, name.split("-")
    config = (own / "config.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text("\n".join(config.splitlines()[2:]))  # what it is of goes first
    target = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (target.target.tasks, target.target.seeds, target.run.seed) == ([task], None, int(seed))
    out = tmp_path / "scores.json"
    assert main(["evaluate", "--prompt", str(own), "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == results(own)


def test_the_job_sums_up_its_runs(trained: Trained, capsys) -> None:
    found = results(trained.job)
    assert (found["seed"], found["seeds"], found["runs"]) == (None, SEEDS, NAMES)
    for task in TASKS:
        scores = [results(trained.job / "runs" / f"{task}-{seed}")["tasks"][task]["score"] for seed in SEEDS]
        assert found["tasks"][task]["scores"] == scores
        assert found["tasks"][task]["score"] == pytest.approx(fmean(scores))
        assert found["tasks"][task]["std"] == pytest.approx(stdev(scores))
    assert found["rows_processed"] == {"source": 0, "target": 4 * 6 * 4}
    assert found["trainable_parameters"] == 4 * (5 * 32 + 5 + 32)
    lines = [line for line in log(trained.job) if "loss" in line]
    for line in lines:
        of_runs = [next(x for x in log(trained.job / "runs" / n) if x["step"] == line["step"])["loss"] for n in NAMES]
        assert line["run_losses"] == dict(zip(NAMES, of_runs, strict=True))
        assert line["loss"] == pytest.approx(fmean(of_runs))
    validations = [line["validation"] for line in log(trained.job) if "validation" in line]
    assert [list(v) for v in validations] == [[*TASKS, "mean"]] * 2


def test_resumed_from_the_middle_it_ends_the_same(trained: Trained, tmp_path: Path) -> None:
    job = tmp_path / "job"
    shutil.copytree(trained.job, job)
    (job / "results.json").unlink()
    (job / "checkpoints/step-00000006.safetensors").unlink()
    for name in NAMES[2:]:
        (job / "runs" / name / "results.json").unlink()
        (job / "runs" / name / "prompt.safetensors").unlink()
    assert main(trained.command(job, *TOGETHER, "--resume")) == 0
    assert results(job) == results(trained.job)
    for name in NAMES:
        right, found = (load_file(folder / "runs" / name / "prompt.safetensors") for folder in (trained.job, job))
        assert all(torch.equal(found[part], tensor) for part, tensor in right.items())
        assert log(job / "runs" / name) == log(trained.job / "runs" / name)


def test_overwriting_removes_the_runs_before(trained: Trained, tmp_path: Path) -> None:
    job = tmp_path / "job"
    shutil.copytree(trained.job, job)
    one = ["--set", "target.seeds=[5]", "--set", "target.steps=2"]
    assert main(trained.command(job, *one, "--overwrite")) == 0
    assert [entry.name for entry in (job / "runs").iterdir()] == ["mrpc-5"]
    assert results(job)["tasks"]["mrpc"]["std"] is None  # of one run


def test_several_tasks_together_with_several_seeds(trained: Trained, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert main(trained.command(job, *TOGETHER, "--set", "target.multi=true", "--set", "target.steps=2")) == 0
    for seed in SEEDS:
        run = job / "runs" / f"multi-{seed}"
        assert list(results(run)["tasks"]) == TASKS
        assert set(load_file(run / "prompt.safetensors")) == {"full", *(f"{t}.{part}" for t in TASKS for part in "ab")}
    assert results(job)["runs"] == ["multi-0", "multi-3"]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["target.seeds=[]"], "target.seeds"),
        (["target.seeds=[1, 2, 1]"], "seeds names 1 more than once"),
        (["target.seeds=[-1]"], "target.seeds"),
        (["target.seeds=3"], "target.seeds"),
        ([f"target.tasks=[{', '.join(TASKS)}]"], "or to each alone, side by side (--set target.seeds=[0])"),
    ],
)
def test_a_mistake_is_a_line(trained: Trained, tmp_path: Path, capsys, wrong: list[str], line: str) -> None:
    settings = [argument for value in wrong for argument in ("--set", value)]
    assert main(trained.command(tmp_path / "job", *settings)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and line in said[0]
    assert not (tmp_path / "job").exists()


def test_the_job_is_no_prompt(trained: Trained, capsys) -> None:
    assert main(["evaluate", "--prompt", str(trained.job)]) == 2
    assert f"holds 4 runs side by side; give one of them, such as {trained.job}/runs/cola-0" in capsys.readouterr().err


def test_another_seed_is_another_run(trained: Trained, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.alone["mrpc-0"], run)
    assert main(trained.command(run, "--set", "target.tasks=[mrpc]", "--set", "run.seed=3", "--resume")) == 2
    assert "run.seed differs" in capsys.readouterr().err
