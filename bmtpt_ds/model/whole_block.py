"""A T5 block of a GPU as one node of autograd, with its gradient written out: the host is done before the GPU is.

Through autograd a block of packed rows is some hundred small operations each way, most of them views: at T5-3b the host
takes twice the GPU's time for them, at T5-base eight times. Here the kernels alone are left, on the packed tokens as
they lie. The weights are frozen, so nothing is kept for gradients of theirs.

Symbols: H hidden size, d values of a head, N rows of a span, Q query tokens and K key tokens of a row.
"""

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerSelfAttention,
)

from bmtpt_ds.model.attention import Tiling, attend, attend_gradient, tiling_of
from bmtpt_ds.model.norm import norm_gradient, normed
from bmtpt_ds.model.packed import Spans, kind_of

_aten = torch.ops.aten
Kept = list[Tensor]  # for the backward pass: what a layer adds last its gradient takes first


def can_be_whole(block: nn.Module) -> bool:
    """Whether this file has the block's gradient: its feed-forward layer has ReLU, or a gate with GELU's tanh form."""
    dense = block.layer[-1].DenseReluDense
    if isinstance(dense, T5DenseGatedActDense):
        return isinstance(dense.act, nn.GELU) and dense.act.approximate == "tanh"
    return type(dense) is T5DenseActDense and isinstance(dense.act, nn.ReLU)


def run_whole(block: nn.Module, hidden: Tensor, encoded: Tensor | None, spans: Spans) -> Tensor:
    """What the block makes of the packed tokens [1, tokens, H]; its weights must be there, whole.

    Args:
        encoded: [1, encoder tokens, H], for a decoder.
    """
    return _Block.apply(hidden, encoded, block, spans)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, encoded: Tensor | None, block: nn.Module, spans: Spans) -> Tensor:
        kept: Kept = []
        states, keys_of = hidden[0], None if encoded is None else encoded[0]
        for layer in block.layer[:-1]:
            attention = _attention_of(layer)
            others = keys_of if kind_of(attention) == "cross" else None
            tiling = tiling_of(spans, attention, states.device)
            states = _attention_layer(layer.layer_norm, attention, states, others, tiling, kept)
        states = _feed_forward_layer(block.layer[-1], states, kept)
        ctx.block, ctx.spans = block, spans
        ctx.save_for_backward(*kept)
        return states[None]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        kept, of_encoded = list(ctx.saved_tensors), None
        states = _feed_forward_gradient(ctx.block.layer[-1], gradient[0].contiguous(), kept)
        for layer in reversed(ctx.block.layer[:-1]):
            attention = _attention_of(layer)
            tiling = tiling_of(ctx.spans, attention, states.device)
            states, of_keys = _attention_gradient(layer.layer_norm, attention, states, tiling, kept)
            of_encoded = of_encoded if of_keys is None else of_keys[None]
        return states[None], of_encoded, None, None


def _attention_of(layer: nn.Module) -> T5Attention:
    return layer.SelfAttention if isinstance(layer, T5LayerSelfAttention) else layer.EncDecAttention


def _attention_layer(
    norm: nn.Module,
    attention: T5Attention,
    states: Tensor,  # [queries of all rows, H]
    others: Tensor | None,  # [keys of all rows, H]; None: the queries' own
    tiling: Tiling,
    kept: Kept,
) -> Tensor:
    """states + attention of the normed states."""
    inputs, scale = normed(states, norm.weight, norm.variance_epsilon)
    keys_of = inputs if others is None else others
    query = inputs @ attention.q.weight.t()
    key, value = keys_of @ attention.k.weight.t(), keys_of @ attention.v.weight.t()
    found, sums = attend(query, key, value, tiling)
    kept += [states, scale, query, key, value, found, sums]
    return torch.addmm(states, found, attention.o.weight.t())


def _attention_gradient(
    norm: nn.Module, attention: T5Attention, gradient: Tensor, tiling: Tiling, kept: Kept
) -> tuple[Tensor, Tensor | None]:
    """Of the states, and of the encoder's where these are the keys."""
    states, scale, *of_attention = kept[-7:]
    del kept[-7:]
    of_found = gradient @ attention.o.weight
    of_query, of_key, of_value = attend_gradient(of_found, *of_attention, tiling)
    of_inputs = of_query @ attention.q.weight
    of_others = None
    if kind_of(attention) == "cross":
        of_others = (of_key @ attention.k.weight).addmm_(of_value, attention.v.weight)
    else:
        of_inputs.addmm_(of_key, attention.k.weight).addmm_(of_value, attention.v.weight)
    return norm_gradient(of_inputs, states, norm.weight, scale).add_(gradient), of_others


def _feed_forward_layer(layer: nn.Module, states: Tensor, kept: Kept) -> Tensor:
    """states + feed-forward of the normed states."""
    norm, dense = layer.layer_norm, layer.DenseReluDense
    inputs, scale = normed(states, norm.weight, norm.variance_epsilon)
    kept += [states, scale]
    if isinstance(dense, T5DenseGatedActDense):
        gate, other = inputs @ dense.wi_0.weight.t(), inputs @ dense.wi_1.weight.t()
        opened = nn.functional.gelu(gate, approximate="tanh")
        kept += [gate, opened, other]
        inner = opened * other
    else:
        inner = (inputs @ dense.wi.weight.t()).relu_()
        kept.append(inner)
    return torch.addmm(states, inner, dense.wo.weight.t())


def _feed_forward_gradient(layer: nn.Module, gradient: Tensor, kept: Kept) -> Tensor:
    norm, dense = layer.layer_norm, layer.DenseReluDense
    of_inner = gradient @ dense.wo.weight
    if isinstance(dense, T5DenseGatedActDense):
        other, opened, gate = kept.pop(), kept.pop(), kept.pop()
        of_inputs = (of_inner * opened) @ dense.wi_1.weight
        of_inputs.addmm_(_aten.gelu_backward(of_inner.mul_(other), gate, approximate="tanh"), dense.wi_0.weight)
    else:
        inner = kept.pop()
        of_inputs = _aten.threshold_backward(of_inner, inner, 0) @ dense.wi.weight
    scale, states = kept.pop(), kept.pop()
    return norm_gradient(of_inputs, states, norm.weight, scale).add_(gradient)
