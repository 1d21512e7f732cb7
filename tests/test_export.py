"""Prompts as PEFT adapters, against PEFT itself: the same files, logits and texts."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from bmtpt_ds.cli import main
from tests.peft_adapters import (
    MULTI,
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
    peft,
    plain,
    prompt_of,
)
from tests.real_rows import copy_rows


@pytest.mark.parametrize("kind", ["multitask", "composed"])
def test_the_files_are_those_that_peft_saves(kind: str, exported: Exported, untied_model: Path, tmp_path: Path) -> None:
    config = multitask() if kind == "multitask" else plain(num_transformer_submodules=1)
    tuned = peft.get_peft_model(T5ForConditionalGeneration.from_pretrained(untied_model), config)
    held, encoder = load_file(exported.run / "prompt.safetensors"), tuned.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(held["full"] if kind == "multitask" else prompt_of(exported.run, "rte"))
        if kind == "multitask":
            encoder.prefix_task_cols.copy_(torch.stack([held[f"{task}.a"] for task in TASKS])[:, :, None])
            encoder.prefix_task_rows.copy_(torch.stack([held[f"{task}.b"] for task in TASKS])[:, None, :])
    tuned.save_pretrained(tmp_path)
    ours = exported.multitask if kind == "multitask" else exported.composed / "rte"
    assert (ours / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()
    texts = [(folder / "adapter_config.json").read_text() for folder in (ours, tmp_path)]
    assert re.sub(r'"peft_version": ".*"', "", texts[0]) == re.sub(r'"peft_version": ".*"', "", texts[1])


def test_peft_computes_what_our_backbone_does(exported: Exported, untied_model: Path, loaded) -> None:
    batch = batch_of(TEXTS, untied_model)
    together = in_peft(exported.multitask, untied_model)
    for number, task in enumerate(TASKS):
        prompt = prompt_of(exported.run, task)
        assert_same(together, loaded.backbone, prompt, batch, number)
        assert_same(in_peft(exported.composed / task, untied_model), loaded.backbone, prompt, batch)


def test_one_task_by_itself(exported: Exported, untied_model: Path, loaded, tmp_path: Path) -> None:
    prompt, batch = prompt_of(exported.run, "rte"), batch_of(TEXTS, untied_model)
    folder = export(exported.run, tmp_path / "composed", "--composed", "--task", "rte")
    assert_same(in_peft(folder, untied_model), loaded.backbone, prompt, batch)
    folder = export(exported.run, tmp_path / "multi", "--task", "rte", "mrpc")  # numbered in this order
    assert_same(in_peft(folder, untied_model), loaded.backbone, prompt, batch, 0)


def test_a_source_run_is_its_particles_mean(runs, untied_model: Path, loaded, tmp_path: Path) -> None:
    folder = export(runs.source, tmp_path / "start")
    mean = load_file(runs.source / "particles.safetensors")["particles"].mean(dim=0)
    assert_same(in_peft(folder, untied_model), loaded.backbone, mean, batch_of(TEXTS, untied_model))
    back = import_(tmp_path / "back", folder)
    assert torch.equal(load_file(back / "particles.safetensors")["particles"], mean[None])


def test_the_model_card(exported: Exported, untied_model: Path, recipe: Path, tmp_path: Path) -> None:
    folder = export(exported.run, tmp_path / "card", "--license", "cc-by-4.0")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert (head["base_model"], head["library_name"], head["license"]) == (str(untied_model), "peft", "cc-by-4.0")
    assert set(TASKS) < set(head["tags"])
    scores = json.loads((exported.run / "results.json").read_text())["tasks"]
    for number, task in enumerate(TASKS):
        shown, score = scores[task], f"| {task} | {scores[task]['metric']} | {scores[task]['score']:.1f} |"
        assert f"| {number} | {task} | `sentence1: " in text
        assert f"{score} {shown['majority']:.1f} |" in text
    for told in (
        "8 labelled rows",
        "Seed 0",
        "| particles M | 3 |",
        "gaussian, sigma 100000",
        "sst2, cola",
        "0.3, 0.4",
    ):
        assert told in text
    alone = tmp_path / "alone"
    command = ["adapt", "--config", str(recipe), "--particles", "none", "--run-dir", str(alone)]
    assert main(command) == 0
    text = (export(alone, tmp_path / "alone card") / "README.md").read_text()
    assert "| start | vocab, no source stage |" in text and "| prior | none |" in text and "SVGD" not in text
    assert "license: unknown" in (exported.multitask / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "stage"),
    [(method, "adapt") for method in ("vanilla_transfer", "spot", "mpt", "prompt_tuning")]
    + [(method, "source") for method in ("vanilla_transfer", "mpt")],  # SPoT's has no one prompt
)
def test_the_card_of_another_method_tells_of_that_one(method: str, stage: str, recipe: Path, tmp_path: Path) -> None:
    named = ["--config", str(recipe), "--set", f"method={method}", "--set", "source.steps=2", "--set", "target.steps=2"]
    particles, run = "none" if method == "prompt_tuning" else str(tmp_path / "source"), tmp_path / stage
    if method != "prompt_tuning":
        assert main(["source", *named, "--run-dir", particles]) == 0
    if stage == "adapt":
        assert main(["adapt", *named, "--particles", particles, "--run-dir", str(run)]) == 0
    _, front, text = (export(run, tmp_path / "card") / "README.md").read_text().split("---\n", 2)
    assert f"| method | {method} |" in text
    assert "bmtpt" not in yaml.safe_load(front)["tags"]
    for theirs in ("Bayesian", "SVGD", "particle", "posterior", "prior"):
        assert theirs not in text
    assert ("of a and b" in text) == (method == "mpt" and stage == "adapt")


@pytest.mark.parametrize("kind", ["multitask", "composed/mrpc"])
def test_the_cards_code_runs(kind: str, exported: Exported, monkeypatch) -> None:
    folder = exported.multitask if kind == "multitask" else exported.composed / "mrpc"
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(folder)
    exec(code, names := {})
    assert names["ids"].shape[0] == (2 if kind == "multitask" else 1)
    assert len(names["ids"][0]) > 1


def test_the_readmes_code_runs(exported: Exported, untied_model: Path, tmp_path: Path) -> None:
    folder = export(exported.run, tmp_path / "mrpc-prompt", "--task", "mrpc")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "PeftModel" in block)
    names = {"torch": torch, "PeftModel": peft.PeftModel, "AutoModelForSeq2SeqLM": AutoModelForSeq2SeqLM}
    names["tokenizer"] = AutoTokenizer.from_pretrained(untied_model)
    exec(code.replace("google-t5/t5-base", str(untied_model)).replace("mrpc-prompt", str(folder)), names)
    assert len(names["ids"]) == 1


def test_neither_command_needs_peft(exported: Exported, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    import_(tmp_path / "run", export(exported.run, tmp_path / "adapter"))


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.slow  # a minute; the tiny model's tests hold the same of files and logits
def test_real_model_and_rows(shared: Path, tmp_path: Path) -> None:
    """A few steps of two tasks; 50 rows of one, 10 of the other, in both formats, by PEFT and by our backbone."""
    from bmtpt_ds.config import ModelConfig, deepspeed_json
    from bmtpt_ds.parallel import Ranks, load_backbone

    model = shared / "models/flan-t5-small-titles"
    data = copy_rows(shared, tmp_path / "data", TASKS, train=60)
    settings = [f"model.name_or_path={model}", f"data.root={data}", "target.steps=8", "target.batch_size=4"]
    chosen = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    command = ["adapt", "--config", "first_run", *chosen, *MULTI, "--particles", "none", "--run-dir", str(run)]
    assert main(command) == 0
    backbone = load_backbone(Ranks(60), ModelConfig(name_or_path=str(model)), deepspeed_json.load("resident")).backbone
    together, apart = export(run, tmp_path / "multi"), export(run, tmp_path / "each", "--composed")
    multi = in_peft(together, model)
    for number, (task, count) in enumerate(zip(TASKS, (50, 10), strict=True)):
        rows = [json.loads(line) for line in (data / task / "validation.jsonl").read_text().splitlines()][:count]
        texts = [f"sentence1: {row['sentence1']} sentence2: {row['sentence2']}" for row in rows]
        batch, prompt = batch_of(texts, model), prompt_of(run, task)
        assert len(batch.source_ids) == count
        assert_same(multi, backbone, prompt, batch, number)
        assert_same(in_peft(apart / task, model), backbone, prompt, batch)
    back = import_(tmp_path / "back", together)
    assert_same_file(back / "prompt.safetensors", run / "prompt.safetensors")
