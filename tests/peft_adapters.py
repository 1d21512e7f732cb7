"""What the tests of export and import share: our commands, adapters that PEFT trains, and PEFT beside our backbone."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5ForConditionalGeneration

from bmtpt_ds.cli import main
from bmtpt_ds.data.tokens import IGNORE, Batch

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


def make_exported(folder: Path, source: Path, recipe: str) -> Exported:
    """A run of two tasks that starts from the run of `source`, and its adapters."""
    (folder / "recipe.yaml").write_text(recipe)
    run = folder / "glue"
    command = ["adapt", "--config", str(folder / "recipe.yaml"), *MULTI, "--particles", str(source)]
    assert main([*command, "--run-dir", str(run)]) == 0
    return Exported(run, export(run, folder / "multi"), export(run, folder / "each", "--composed"))
