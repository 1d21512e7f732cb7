"""The methods that tune weights against transformers, PEFT, and the equations by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import T5ForConditionalGeneration

from bmtpt_ds.data.tokens import TokenRow, collate
from bmtpt_ds.methods.bitfit import add_biases
from bmtpt_ds.methods.fine_tuning import free_weights
from bmtpt_ds.methods.lora import add_lora
from bmtpt_ds.model.backbone import mean_token_losses
from tests.methods.weights import BUCKETS, CPU, METHODS, PADDED, Named, gradients_of, losses_of, moved
from tests.model.test_backbone import load


@pytest.fixture(params=["tied_model", "untied_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def their_losses(model: nn.Module) -> torch.Tensor:
    """Of transformers' model over the padded batch, a row each."""
    (batch,) = collate(PADDED, 0).on(CPU)
    logits = model(input_ids=batch.source_ids, attention_mask=batch.source_mask, labels=batch.labels).logits
    return mean_token_losses(logits.flatten(0, 1), [batch.labels])


@pytest.mark.parametrize("cut", [PADDED, BUCKETS], ids=["padded", "buckets"])
def test_fine_tuning_is_transformers(folder: Path, cut: list[list[TokenRow]]) -> None:
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    backbone = load(folder)
    found, theirs = free_weights(backbone), dict(model.named_parameters())
    losses, expected = losses_of(backbone, cut), their_losses(model)
    torch.testing.assert_close(losses, expected)
    weighting = torch.tensor([1.0, -2.0, 0.5])  # of the rows, so that none stands for another
    gradients = gradients_of((losses * weighting).sum(), found)
    wanted = gradients_of((expected * weighting).sum(), theirs)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, of=name: of + text)


def test_lora_is_pefts_over_five_steps(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    backbone = load(folder).double()
    found = add_lora(backbone, rank=3, alpha=12, seed=1)
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(T5ForConditionalGeneration.from_pretrained(folder).double(), config).eval()
    theirs = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    assert list(found) == list(theirs)
    for name, value in found.items():
        theirs[name].data.copy_(value)
    optimizers = [torch.optim.AdamW(list(those.values()), lr=3e-2) for those in (found, theirs)]
    seen = []
    for _ in range(5):
        losses, expected = losses_of(backbone), their_losses(model)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        gradients, wanted = gradients_of(losses.sum(), found), gradients_of(expected.sum(), theirs)
        for name in found:
            torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-4, atol=1e-6)
            found[name].grad, theirs[name].grad = gradients[name], wanted[name]
        for optimizer in optimizers:
            optimizer.step()
        seen.append(losses.sum().item())
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.95 * seen[0]


def by_hand(weights: Named, tuned: Named, x: torch.Tensor, heads: int, gated: bool) -> torch.Tensor:
    """The encoder's first block on x [tokens, H], with the adapters and biases among `tuned`, without padding."""
    block = "encoder.block.0.layer."

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return states @ weights[name + ".weight"].T + tuned.get(name + ".bias", 0)

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        rms = (states**2).mean(dim=-1, keepdim=True).add(1e-6).sqrt()
        return weights[name + ".weight"] * states / rms + tuned.get(name + ".bias", 0)

    def last(name: str, states: torch.Tensor) -> torch.Tensor:
        y = linear(name, states)
        down, up = f"{name}.adapter.down", f"{name}.adapter.up"
        return y + linear(up, gelu(linear(down, y), approximate="tanh")) if f"{down}.weight" in tuned else y

    attention, dense = f"{block}0.SelfAttention.", f"{block}1.DenseReluDense."
    inner = norm(f"{block}0.layer_norm", x)
    q, k, v = (linear(attention + part, inner).unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qkv")
    ahead = torch.arange(len(x)) - torch.arange(len(x))[:, None]
    buckets = ahead.abs() + 16 * (ahead > 0)  # of texts of up to 8 tokens: a bucket for each distance and direction
    bias = weights[attention + "relative_attention_bias.weight"][buckets].permute(2, 0, 1)
    attended = (q @ k.mT + bias).softmax(dim=-1) @ v
    x = x + last(attention + "o", attended.transpose(0, 1).flatten(1))
    inner = norm(f"{block}1.layer_norm", x)
    if gated:
        inner = gelu(linear(dense + "wi_0", inner), approximate="tanh") * linear(dense + "wi_1", inner)
    else:
        inner = linear(dense + "wi", inner).relu()
    return x + last(dense + "wo", inner)


@pytest.mark.parametrize("name", ["adapter", "bitfit"])
def test_a_block_is_the_equation(folder: Path, name: str) -> None:
    backbone = load(folder).double()
    found = METHODS[name](backbone)
    moved(found, 0.3)
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        block = backbone.encoder.block[0](x[None])
        block = block[0] if isinstance(block, tuple) else block
        expected = by_hand(dict(backbone.named_parameters()), found, x, 4, backbone.config.is_gated_act)
    torch.testing.assert_close(block[0], expected, rtol=1e-6, atol=1e-6)  # the norms' mean squares are in float32


def test_biases_of_the_head_and_the_last_norms_are_added(folder: Path) -> None:
    backbone = load(folder)
    found, x = add_biases(backbone), torch.randn(5, 32)
    for name in ("lm_head", "encoder.final_layer_norm", "decoder.final_layer_norm"):
        layer, bias = backbone.get_submodule(name), found[name + ".bias"]
        without = layer(x)
        with torch.no_grad():
            bias += torch.randn_like(bias)
        torch.testing.assert_close(layer(x), without + bias)
