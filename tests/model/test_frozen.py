"""The frozen model's own layers against transformers', in float64 and in what a run computes in."""

from pathlib import Path

import pytest
import torch
from transformers import T5Config
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm

from bmtpt_ds.data.tokens import TokenRow, collate
from bmtpt_ds.model.backbone import Backbone
from bmtpt_ds.model.frozen import (
    CrossAttention,
    FrozenNorm,
    HeadwiseLinear,
    train_only,
    use_frozen_layers,
    use_trainable_layers,
)
from tests.model.test_backbone import load

CPU = torch.device("cpu")
ROWS = [
    TokenRow([5, 6, 7, 8, 9, 10, 11, 12, 13, 1], [40, 1]),
    TokenRow([10, 11, 12, 1], [40, 41, 1]),
    TokenRow([13, 14, 1], [42, 1]),
]


def norms(dtype: torch.dtype) -> tuple[T5LayerNorm, T5LayerNorm]:
    theirs = T5LayerNorm(48)
    theirs.weight.data = 1 + 0.3 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    theirs.to(dtype).requires_grad_(False)
    ours = T5LayerNorm(48).to(dtype).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    use_frozen_layers(ours)
    assert type(ours) is FrozenNorm
    return theirs, ours


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_norm_and_its_gradient_are_transformers(dtype: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(1)
    x, along = (torch.randn(2, 5, 48, generator=draw).to(dtype) * size for size in (7.0, 1.0))
    found = []
    for norm in norms(dtype):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        found.append((y, *torch.autograd.grad(y, leaf, along)))
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_norms_gradient_is_that_of_its_values() -> None:
    _, norm = norms(torch.float64)
    assert torch.autograd.gradcheck(norm, torch.randn(2, 3, 48, dtype=torch.float64, requires_grad=True))


def test_the_norm_keeps_its_input_alone() -> None:
    kept = []
    x = torch.randn(2, 5, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norms(torch.float32)[1](x)
    assert sorted(tensor.numel() for tensor in kept) == [2 * 5, 48, x.numel()]


def crossing(backbone: Backbone) -> list[T5Attention]:
    return [block.layer[1].EncDecAttention for block in backbone.decoder.block]


def losses_and_gradient(backbone: Backbone, cut: list[list[TokenRow]]) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randn(len(ROWS), 5, 32, generator=draw, dtype=backbone.dtype).requires_grad_()
    losses = backbone.row_losses(prompts, collate(cut, 0).on(CPU))
    return losses, *torch.autograd.grad(losses.sum(), prompts)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What headwise layers are asked for beyond the plain product."""
    found, plain = [], HeadwiseLinear.forward
    monkeypatch.setattr(HeadwiseLinear, "forward", lambda *args: found.append(args[2:]) or plain(*args))
    return found


@pytest.mark.parametrize("cut", [[ROWS[:1], ROWS[1:]], [ROWS]], ids=["buckets", "padded"])
def test_attention_without_keys_and_values_is_transformers(untied_model: Path, cut, calls: list[tuple]) -> None:
    backbone = load(untied_model).double()
    ours = losses_and_gradient(backbone, cut)
    assert calls == [(False,), (True,)] * len(crossing(backbone))  # of the queries and what they found, not of all keys
    for attention in crossing(backbone):
        assert type(attention) is CrossAttention
        attention.__class__ = T5Attention
    for found, expected in zip(ours, losses_and_gradient(backbone, cut), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_long_targets_get_keys_and_values(untied_model: Path, calls: list[tuple]) -> None:
    backbone = load(untied_model).double()
    losses_and_gradient(backbone, [[TokenRow(row.source, [*range(40, 50), 1]) for row in ROWS]])
    assert calls == [(), ()] * len(crossing(backbone))


def test_a_headwise_linear_layers_gradients_are_autograds() -> None:
    layer = HeadwiseLinear(12, 3 * 4, bias=False).double().requires_grad_(False)
    parts = layer.weight.view(3, 4, 12)
    for to_heads, width, formula in ((True, 12, "htH,hdH->htd"), (False, 4, "htd,hdH->htH")):
        states = torch.randn(3, 5, width, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(layer(states, to_heads), torch.einsum(formula, states, parts))
        assert torch.autograd.gradcheck(lambda x, way=to_heads: layer(x, way), states)


def test_gelu_is_transformers() -> None:
    layer = T5DenseGatedActDense(T5Config(d_model=8, d_ff=16, feed_forward_proj="gated-gelu", dropout_rate=0)).double()
    assert isinstance(layer.act, NewGELUActivation)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    expected = layer(x), *torch.autograd.grad(layer(x).sum(), x)
    use_frozen_layers(layer)
    assert isinstance(layer.act, torch.nn.GELU)
    for found, theirs in zip((layer(x), *torch.autograd.grad(layer(x).sum(), x)), expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)


def test_trainable_layers_are_transformers(untied_model: Path) -> None:
    backbone = load(untied_model).double()
    theirs = {name: type(module) for name, module in Backbone(backbone.config).named_modules()}
    expected = losses_and_gradient(backbone, [ROWS])
    use_trainable_layers(backbone)
    for name, module in backbone.named_modules():
        assert type(module) is theirs[name] or isinstance(module, torch.nn.GELU)
    for found, wanted in zip(losses_and_gradient(backbone, [ROWS]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_training_some_freezes_the_others(tied_model: Path) -> None:
    backbone = load(tied_model).requires_grad_(True)
    found = train_only(backbone, lambda name: name.endswith(("q.weight", "shared.weight")))
    assert next(iter(found)) == "shared.weight"
    assert len(found) == 1 + 6  # the head is the embedding
    assert found == {name: value for name, value in backbone.named_parameters() if value.requires_grad}
