"""The methods that tune weights: what is trained, where it begins, that nothing else changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from bmtpt_ds.data.tokens import Batch, collate
from bmtpt_ds.errors import UserError
from bmtpt_ds.methods.adapter import add_adapters
from bmtpt_ds.methods.bitfit import add_biases
from bmtpt_ds.methods.fine_tuning import free_weights
from bmtpt_ds.methods.lora import add_lora
from bmtpt_ds.model.backbone import build_backbone, checkpoint_activations, prepared_config
from bmtpt_ds.model.shapes import shape
from tests.methods.weights import CPU, METHODS, PADDED, Method, gradients_of, losses_of, moved, no_prompts, text_of
from tests.model.test_backbone import load

NAMES_AND_SUMS = """
import json, sys
from pathlib import Path
from tests.methods.test_weights import names_and_sums
print(json.dumps(names_and_sums(Path(sys.argv[1]))))
"""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    if request.param == "lora":
        pytest.importorskip("peft")
    return METHODS[request.param]


@pytest.fixture(params=["tied_model", "untied_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("method", "count"),
    [(add_lora, 884_736), (add_adapters, 48 * 37_656 + 47_616), (add_biases, 282_496), (free_weights, 222_903_552)],
)
def test_values_at_t5_base(method: Method, count: int) -> None:
    if method is add_lora:
        pytest.importorskip("peft")
    config, meta = T5Config(**shape("t5-base")), torch.device("meta")
    backbone = build_backbone(prepared_config(config, 0.0), dtype=torch.float32, own_head=False, building=meta)
    found = method(backbone)
    assert sum(value.numel() for value in found.values()) == count
    if method is free_weights:
        with meta:
            theirs = T5ForConditionalGeneration(T5Config(**shape("t5-base")))
        assert found.keys() == {name for name, _ in theirs.named_parameters()}


def test_what_is_returned_is_what_is_trained(folder: Path, method: Method) -> None:
    backbone = load(folder)
    found = method(backbone)
    named = dict(backbone.named_parameters())
    assert list(found) == [name for name, value in named.items() if value.requires_grad]
    assert all(value is named[name] for name, value in found.items())
    moved(found)
    losses_of(backbone).sum().backward()
    assert {name for name, value in named.items() if value.grad is not None} == found.keys()
    assert all(value.grad.any() for value in found.values())


def test_adapters_stand_behind_self_attention_and_feed_forward(folder: Path) -> None:
    found = METHODS["adapter"](load(folder))
    places = {name.split(".adapter.")[0] for name in found if ".adapter." in name}
    decoder = [("0", "SelfAttention.o"), ("2", "DenseReluDense.wo")]
    encoder = [("0", "SelfAttention.o"), ("1", "DenseReluDense.wo")]
    assert places == {
        f"{stack}.block.{i}.layer.{j}.{last}"
        for stack, layers in (("encoder", encoder), ("decoder", decoder))
        for i in range(2)
        for j, last in layers
    }


def names_and_sums(folder: Path) -> dict[str, list[list]]:
    """Of every method, what it trains, in its order."""
    return {
        name: [[key, value.double().sum().item()] for key, value in method(load(folder)).items()]
        for name, method in METHODS.items()
    }


def test_another_process_finds_the_same_names_and_values(untied_model: Path) -> None:
    pytest.importorskip("peft")
    there = subprocess.run(
        [sys.executable, "-c", NAMES_AND_SUMS, str(untied_model)],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout.splitlines()[-1]) == names_and_sums(untied_model)


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_the_seed_alone_says_what_is_drawn(untied_model: Path, name: str) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = METHODS[name](load(untied_model), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (METHODS[name](load(untied_model), seed=seed) for seed in (1, 2))
    half = METHODS[name](load(untied_model).bfloat16(), seed=1)
    drawn = [key for key in first if "lora_A" in key or key.endswith(("down.weight", "up.weight"))]
    assert len(drawn) == {"lora": 12, "adapter": 16}[name]
    for key in first:
        assert torch.equal(first[key], again[key])
        assert torch.equal(first[key].bfloat16(), half[key])
        assert torch.equal(first[key], other[key]) == (key not in drawn)


def test_adapters_begin_small(untied_model: Path) -> None:
    found = add_adapters(load(untied_model), reduction=1)
    weights = torch.cat(
        [value.flatten() for name, value in found.items() if name.endswith(("down.weight", "p.weight"))]
    )
    assert abs(weights.mean()) < 5e-4
    assert abs(weights.std() - 0.01) < 5e-4
    assert not any(value.any() for name, value in found.items() if name.endswith(".bias"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_nothing_changes_at_first(folder: Path, method: Method, dtype: torch.dtype, tolerance: float) -> None:
    plain, backbone = load(folder).to(dtype), load(folder).to(dtype)
    found = method(backbone)
    assert {value.dtype for value in found.values()} == {dtype}
    assert {value.device for value in found.values()} == {CPU}
    if method is METHODS["adapter"]:  # it begins small, not at nothing
        tolerance = max(tolerance, 2e-3)
    before = losses_of(plain)
    torch.testing.assert_close(losses_of(backbone), before, rtol=tolerance, atol=0)
    assert torch.equal(text_of(backbone), text_of(plain))
    moved(found, 0.5)
    assert not torch.allclose(losses_of(backbone), before, rtol=2 * tolerance, atol=0)
    assert not torch.equal(text_of(backbone), text_of(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_gradient(folder: Path, method: Method, dtype: torch.dtype) -> None:
    plain, recomputed = load(folder).to(dtype), load(folder).to(dtype)
    checkpoint_activations(recomputed)
    recomputed.train(recomputed.train_while_tuning)
    calls, first = [], recomputed.encoder.block[0].layer[0]
    first.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for backbone in (plain, recomputed):
        found = method(backbone)
        moved(found)
        gradients.append(gradients_of(losses_of(backbone).sum(), found))
    assert len(calls) == 2  # there and again on the way back
    for name, gradient in gradients[0].items():
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradients[1][name], gradient)


def test_choices_of_a_row_are_read_without_a_prompt(folder: Path, method: Method) -> None:
    backbone = load(folder)
    moved(method(backbone))
    (batch,) = collate(PADDED, 0).on(CPU)
    choices = torch.stack([batch.labels, batch.labels.roll(1, 0)], dim=1)
    found = backbone.row_losses(no_prompts(backbone), [Batch(batch.source_ids, batch.source_mask, choices)])
    torch.testing.assert_close(found[:, 0], losses_of(backbone))


def test_lora_without_peft_says_so(untied_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^method lora needs peft: pip install peft$"):
        add_lora(load(untied_model))


def test_a_bottleneck_of_nothing_is_refused(untied_model: Path) -> None:
    with pytest.raises(UserError, match=r"32 // 33 = 0; reduce by 32 at most"):
        add_adapters(load(untied_model), reduction=33)
