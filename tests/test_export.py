"""Prompts as PEFT adapters and back, against PEFT itself: the same files, logits and texts."""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from bmtpt_ds.cli import main
from bmtpt_ds.data.tokens import IGNORE, Batch
from tests import toy

peft = pytest.importorskip("peft")

TASKS = ["mrpc", "rte"]
TEXTS = ["sentence1: the cat likes a dog sentence2: a dog", "sentence1: good film sentence2: the bad actor was awful ."]
MULTI = ["--set", "target.tasks=[mrpc,rte]", "--set", "target.multi=true"]


class Exported(NamedTuple):
    run: Path  # of `adapt`, two tasks
    multitask: Path
    composed: Path  # a subfolder a task


def export(run: Path, out: Path, *arguments: str) -> Path:
    assert main(["export", "--prompt", str(run), "--format", "peft", "--out", str(out), *arguments]) == 0
    return out


def import_(out: Path, *arguments: Path | str) -> Path:
    assert main(["import", "--peft", *map(str, arguments), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory, runs, untied_model: Path, rows: Path) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "recipe.yaml").write_text(toy.recipe_text(untied_model, rows))
    run = folder / "glue"
    command = ["adapt", "--config", str(folder / "recipe.yaml"), *MULTI, "--particles", str(runs.source)]
    assert main([*command, "--run-dir", str(run)]) == 0
    return Exported(run, export(run, folder / "multi"), export(run, folder / "each", "--composed"))


def prompt_of(run: Path, task: str) -> torch.Tensor:
    """[L, H], as section 4.2.2 defines it."""
    held = load_file(run / "prompt.safetensors")
    return held["full"] * torch.outer(held[f"{task}.a"], held[f"{task}.b"])


def in_peft(adapter: Path, model: Path):
    base = T5ForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def batch_of(texts: list[str], model: Path) -> Batch:
    read = AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt")
    labels = torch.full((len(texts), 3), IGNORE)
    for i in range(len(texts)):
        labels[i, : 2 + i % 2] = torch.tensor([20 + i, 1, 1])[: 2 + i % 2]
    return Batch(read.input_ids, read.attention_mask, labels)


def our_logits(backbone, prompts: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N, T, V] of the backbone's own forward pass."""
    seen = []
    handle = backbone.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits))
    backbone.row_losses(prompts, [batch])
    handle.remove()
    return seen[0][0].view(*batch.labels.shape, -1)


@torch.no_grad()
def assert_same(
    adapted, backbone, prompt: torch.Tensor, batch: Batch, task: int | None = None, words: int = 12
) -> None:
    """Logits to 1e-4 and the ids of greedy texts, of PEFT and of our backbone behind `prompt` [L, H]."""
    rows = len(batch.source_ids)
    given = {"input_ids": batch.source_ids, "attention_mask": batch.source_mask}
    given |= {} if task is None else {"task_ids": torch.full((rows,), task)}
    prompts = prompt.expand(rows, -1, -1)
    theirs = adapted(**given, labels=batch.labels).logits
    torch.testing.assert_close(theirs, our_logits(backbone, prompts, batch), rtol=0, atol=1e-4)
    texts = adapted.generate(**given, max_new_tokens=words, do_sample=False, num_beams=1)
    assert torch.equal(texts, backbone.generate_ids(prompts, batch, words))


def assert_same_file(*files: Path) -> None:
    """Tensors and the state in the header, whose order safetensors leaves open."""
    held, states = [load_file(file) for file in files], []
    for file in files:
        with safe_open(file, "pt") as opened:
            states.append(opened.metadata())
    assert states[0] == states[1]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])


def train(model: Path, folder: Path, config, seed: int = 0, **more) -> Path:
    """An adapter that PEFT alone has trained for two steps and saved."""
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(T5ForConditionalGeneration.from_pretrained(model), config)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    batch = batch_of(TEXTS, model)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(input_ids=batch.source_ids, attention_mask=batch.source_mask, labels=batch.labels, **more).loss.backward()
        optimizer.step()
    tuned.save_pretrained(folder)
    return folder


def plain(**settings):
    return peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, **settings)


def multitask(**settings):
    once = {"num_transformer_submodules": 1, "num_tasks": 2, "num_ranks": 1}
    settings = once | settings
    return peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, **settings)


# --- export ----------------------------------------------------------------------------------------------------------


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


def test_the_model_card(exported: Exported, untied_model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
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
    assert "license: unknown" in (exported.multitask / "README.md").read_text()


@pytest.mark.parametrize("kind", ["multitask", "composed/mrpc"])
def test_the_cards_code_runs(kind: str, exported: Exported, monkeypatch, capsys) -> None:
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


# --- import ----------------------------------------------------------------------------------------------------------


def test_an_export_comes_back_bit_for_bit(exported: Exported, tmp_path: Path) -> None:
    run = import_(tmp_path / "run", exported.multitask)
    assert_same_file(run / "prompt.safetensors", exported.run / "prompt.safetensors")
    assert (run / "results.json").read_bytes() == (exported.run / "results.json").read_bytes()
    was, now = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (exported.run, run))
    assert now == {key: value for key, value in was.items() if key != "particles"}
    particles = load_file(run / "particles.safetensors")["particles"]
    assert torch.equal(particles, torch.stack([prompt_of(exported.run, task) for task in TASKS]))


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
    where = ["--set", f"data.root={rows}"]
    assert main(["evaluate", "--prompt", str(run), "--task", "sst2", *where]) == 0
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
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (again, adapter)]
    assert files[0] == files[1]


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_model_and_rows(shared: Path, tmp_path: Path) -> None:
    """A few steps of two tasks, then 50 rows of one and 10 of the other through PEFT and through our backbone, in both formats."""
    from bmtpt_ds.config import ModelConfig, deepspeed_json
    from bmtpt_ds.parallel import Ranks, load_backbone

    model, data = shared / "models/flan-t5-small-titles", tmp_path / "data"
    for task in TASKS:
        (data / task).mkdir(parents=True)
        for split in ("train", "validation"):
            lines = (shared / "data" / task / f"{split}.jsonl").read_text().splitlines()[:60]
            (data / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
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
