"""Prompts of PEFT adapters as runs: ours come back bit for bit, other makers' compute what they do in PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bmtpt_ds.cli import main
from tests.peft_adapters import (
    TASKS,
    TEXTS,
    Exported,
    assert_same,
    assert_same_file,
    batch_of,
    export,
    import_,
    in_peft,
    multitask,
    plain,
    prompt_of,
    train,
)


def test_an_export_comes_back_bit_for_bit(exported: Exported, tmp_path: Path) -> None:
    run = import_(tmp_path / "run", exported.multitask)
    assert_same_file(run / "prompt.safetensors", exported.run / "prompt.safetensors")
    assert (run / "results.json").read_bytes() == (exported.run / "results.json").read_bytes()
    was, now = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (exported.run, run))
    assert now == {key: value for key, value in was.items() if key != "particles"}
    particles = load_file(run / "particles.safetensors")["particles"]
    assert torch.equal(particles, torch.stack([prompt_of(exported.run, task) for task in TASKS]))


def test_weights_that_were_trained_on_are_not_the_runs(exported: Exported, tmp_path: Path, capsys) -> None:
    """Others load the adapter, train, and save it in the same folder: bmtpt.json stays."""
    adapter = Path(shutil.copytree(exported.multitask, tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 3 * value for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    run = import_(tmp_path / "run", adapter)
    assert f"{adapter}: its weights are not those that were exported" in capsys.readouterr().err
    assert not (run / "results.json").exists()
    assert main(["evaluate", "--prompt", str(run)]) == 0
    card = (export(run, tmp_path / "again") / "README.md").read_text()
    assert "None: the run has not been scored." in card and "Not recorded: the prompt was imported." in card
    assert "Bayesian" not in card


@pytest.mark.parametrize("method", ["mpt", "prompt_tuning"])
def test_prompts_of_other_methods_are_particles_too(method: str, recipe: Path, tmp_path: Path, capsys) -> None:
    named = [
        "--config",
        str(recipe),
        "--set",
        f"method={method}",
        "--set",
        "source.steps=2",
        "--set",
        "mpt.distillation=0",
    ]
    particles = "none"
    if method == "mpt":
        particles = str(tmp_path / "source")
        assert main(["source", *named, "--run-dir", particles]) == 0
    assert main(["adapt", *named, "--particles", particles, "--run-dir", str(tmp_path / "adapt")]) == 0
    imported = import_(tmp_path / "imported", export(tmp_path / "adapt", tmp_path / "adapter"))
    begin = ["--particles", str(imported), "--run-dir"]
    assert main(["adapt", "--config", str(recipe), *begin, str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert main(["adapt", *named, *begin, str(tmp_path / "theirs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" not in line and not (tmp_path / "theirs").exists()
    if method == "mpt":
        assert line.endswith("give a source run of method mpt, or --set method=bmtpt")


def test_a_composed_export_scores_as_its_run(exported: Exported, tmp_path: Path) -> None:
    run = import_(tmp_path / "run", exported.composed / "rte")
    assert main(["evaluate", "--prompt", str(run), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert scores == {"rte": json.loads((exported.run / "results.json").read_text())["tasks"]["rte"]}


@pytest.mark.parametrize("submodules", [1, None], ids=["one", "pefts default"])
def test_a_prompt_that_peft_trained(submodules, untied_model: Path, rows: Path, recipe, loaded, tmp_path: Path) -> None:
    adapter = train(untied_model, tmp_path / "theirs", plain(num_transformer_submodules=submodules))
    run = import_(tmp_path / "run", adapter)
    (particle,) = load_file(run / "particles.safetensors")["particles"]
    assert_same(in_peft(adapter, untied_model), loaded.backbone, particle, batch_of(TEXTS, untied_model))
    adapt = ["adapt", "--config", str(recipe), "--particles", str(run), "--run-dir", str(tmp_path / "adapted")]
    assert main(adapt) == 0
    card = (export(tmp_path / "adapted", tmp_path / "theirs adapted") / "README.md").read_text()
    assert "| start | the mean of imported particles |" in card and "| prior | gaussian, sigma 100000 |" in card
    where = ["--set", f"data.root={rows}"]
    told = tmp_path / "scores.json"
    assert main(["evaluate", "--prompt", str(run), "--task", "sst2", "--json", str(told), *where]) == 0
    assert json.loads(told.read_text())["shots"] is None  # what it was trained on is not known
    assert main(["evaluate", "--prompt", str(run), *where]) == 2  # no task is known
    assert main(["predict", "--prompt", str(run)]) == 2


def test_separately_trained_prompts_become_particles(untied_model: Path, tmp_path: Path, recipe) -> None:
    config = {"num_transformer_submodules": 1}
    adapters = [train(untied_model, tmp_path / f"seed{i}", plain(**config), seed=i) for i in range(3)]
    run = import_(tmp_path / "run", *adapters)
    theirs = [load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in adapters]
    assert torch.equal(load_file(run / "particles.safetensors")["particles"], torch.stack(theirs))
    prior = ["--set", "target.prior=mixture", "--run-dir", str(tmp_path / "adapted")]
    assert main(["adapt", "--config", str(recipe), "--particles", str(run), *prior]) == 0


def test_a_multitask_adapter_that_peft_trained(untied_model: Path, rows: Path, loaded, tmp_path: Path) -> None:
    adapter = train(untied_model, tmp_path / "theirs", multitask(), task_ids=torch.tensor([0, 1]))
    run = import_(tmp_path / "run", adapter, "--task", "cola", "sst2", "--set", f"data.root={rows}")
    theirs, batch = in_peft(adapter, untied_model), batch_of(TEXTS, untied_model)
    for number, task in enumerate(("cola", "sst2")):
        assert_same(theirs, loaded.backbone, prompt_of(run, task), batch, number)
    assert main(["evaluate", "--prompt", str(run)]) == 0
    again = export(run, tmp_path / "again")
    card = (again / "README.md").read_text()
    assert "Trained with PEFT" in card and "Not recorded: the prompt was imported." in card
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (again, adapter)]
    assert files[0] == files[1]
