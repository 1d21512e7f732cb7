"""A T5 block of a GPU as one node of autograd, with its gradient written out: the host is done before the GPU is.

Through autograd a block of packed rows is some hundred small operations each way, most of them views: at T5-3b the host
takes twice the GPU's time for them, at T5-base eight times. Here the kernels alone are left, on the packed tokens as
they lie. The weights are frozen, so nothing is kept for gradients of theirs. Matrices that meet the same inputs (query,
key, value; gate and its factor) lie side by side and are one product each way.

Symbols: H hidden size, d values of a head, N rows of a span, Q query tokens and K key tokens of a row.
"""

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerSelfAttention,
)

from bmtpt_ds.model.attention import attend, attend_gradient, tiling_of
from bmtpt_ds.model.norm import norm_gradient, normed
from bmtpt_ds.model.packed import Spans, kind_of

_aten = torch.ops.aten
Kept = list[Tensor]  # for the backward pass: what a layer adds last its gradient takes first


def can_be_whole(block: T5Block) -> bool:
    """Whether this file has the block's gradient: its feed-forward layer has ReLU, or a gate with GELU's tanh form."""
    dense = block.layer[-1].DenseReluDense
    if isinstance(dense, T5DenseGatedActDense):
        return isinstance(dense.act, nn.GELU) and dense.act.approximate == "tanh"
    return type(dense) is T5DenseActDense and isinstance(dense.act, nn.ReLU)


class Layers:
    """A block's layers. Found once: to look for them in every pass takes the host longer than to launch a kernel."""

    def __init__(self, block: T5Block):
        *attentions, dense = block.layer
        kind = _GatedFeedForward if isinstance(dense.DenseReluDense, T5DenseGatedActDense) else _FeedForward
        self.attentions = [_Attention(layer) for layer in attentions]
        self.feed_forward = kind(dense)


def run_whole(layers: Layers, hidden: Tensor, encoded: Tensor | None, spans: Spans) -> Tensor:
    """What the block makes of the packed tokens [1, tokens, H]; its weights must be there, whole.

    Args:
        encoded: [1, encoder tokens, H], for a decoder.
    """
    return _Block.apply(hidden, encoded, layers, spans)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, encoded: Tensor | None, layers: Layers, spans: Spans) -> Tensor:
        kept: Kept = []
        states, others = hidden[0], None if encoded is None else encoded[0]
        for attention in layers.attentions:
            states = attention.forward(states, others, spans, kept)
        states = layers.feed_forward.forward(states, kept)
        ctx.layers, ctx.spans = layers, spans
        ctx.save_for_backward(*kept)
        return states[None]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        kept, of_encoded = list(ctx.saved_tensors), None
        states = ctx.layers.feed_forward.backward(gradient[0].contiguous(), kept)
        for attention in reversed(ctx.layers.attentions):
            states, of_others = attention.backward(states, ctx.spans, kept)
            of_encoded = of_encoded if of_others is None else of_others[None]
        return states[None], of_encoded, None, None


class _Attention:
    """states + attention of the normed states [queries of all rows, H]: to each other, or over the encoder's [keys of
    all rows, H]."""

    def __init__(self, layer: nn.Module):
        of_itself = isinstance(layer, T5LayerSelfAttention)
        self.norm, self.attention = layer.layer_norm, layer.SelfAttention if of_itself else layer.EncDecAttention
        self.crosses = kind_of(self.attention) == "cross"
        part: T5Attention = self.attention
        # what makes query, key and value of the same states; or the query's, and what makes key and value of others
        self.projections = (
            (part.q, SideBySide(part.k, part.v)) if self.crosses else (SideBySide(part.q, part.k, part.v),)
        )
        self.o = part.o

    def forward(self, states: Tensor, others: Tensor | None, spans: Spans, kept: Kept) -> Tensor:
        inputs, scale = normed(states, self.norm.weight, self.norm.variance_epsilon)
        made = [of @ part.weight.t() for of, part in zip((inputs, others), self.projections, strict=False)]
        found, sums = attend(*self._apart(made), tiling_of(spans, self.attention, states.device))
        kept += [states, scale, *made, found, sums]
        return torch.addmm(states, found, self.o.weight.t())

    def backward(self, gradient: Tensor, spans: Spans, kept: Kept) -> tuple[Tensor, Tensor | None]:
        """Of the states, and of the encoder's where these are the keys."""
        size = 6 if self.crosses else 5
        states, scale, *made, found, sums = kept[-size:]
        del kept[-size:]
        of_made = [torch.empty_like(values) for values in made]
        of_found, tiling = gradient @ self.o.weight, tiling_of(spans, self.attention, states.device)
        attend_gradient(of_found, *self._apart(made), found, sums, tiling, into=self._apart(of_made))
        of_inputs, *of_others = (values @ part.weight for values, part in zip(of_made, self.projections, strict=True))
        of_states = norm_gradient(of_inputs, states, self.norm.weight, scale).add_(gradient)
        return of_states, of_others[0] if of_others else None

    def _apart(self, made: list[Tensor]) -> tuple[Tensor, ...]:
        """Query, key and value, of what the projections make."""
        if self.crosses:
            query, both = made
            return query, *both.chunk(2, dim=1)
        return made[0].chunk(3, dim=1)


class _FeedForward:
    """states + feed-forward, with ReLU, of the normed states."""

    def __init__(self, layer: nn.Module):
        self.norm, self.wi, self.wo = layer.layer_norm, layer.DenseReluDense.wi, layer.DenseReluDense.wo

    def forward(self, states: Tensor, kept: Kept) -> Tensor:
        inputs, scale = normed(states, self.norm.weight, self.norm.variance_epsilon)
        inner = (inputs @ self.wi.weight.t()).relu_()
        kept += [states, scale, inner]
        return torch.addmm(states, inner, self.wo.weight.t())

    def backward(self, gradient: Tensor, kept: Kept) -> Tensor:
        states, scale, inner = kept[-3:]
        of_inputs = _aten.threshold_backward(gradient @ self.wo.weight, inner, 0) @ self.wi.weight
        del kept[-3:]
        return norm_gradient(of_inputs, states, self.norm.weight, scale).add_(gradient)


class _GatedFeedForward:
    """states + feed-forward, with a gate of GELU, of the normed states."""

    def __init__(self, layer: nn.Module):
        dense: T5DenseGatedActDense = layer.DenseReluDense
        self.norm, self.wi, self.wo = layer.layer_norm, SideBySide(dense.wi_0, dense.wi_1), dense.wo

    def forward(self, states: Tensor, kept: Kept) -> Tensor:
        inputs, scale = normed(states, self.norm.weight, self.norm.variance_epsilon)
        made = inputs @ self.wi.weight.t()
        gate, factor = made.chunk(2, dim=1)
        opened = nn.functional.gelu(gate, approximate="tanh")
        kept += [states, scale, made, opened]
        return torch.addmm(states, opened * factor, self.wo.weight.t())

    def backward(self, gradient: Tensor, kept: Kept) -> Tensor:
        states, scale, made, opened = kept[-4:]
        of_inner, of_made = gradient @ self.wo.weight, torch.empty_like(made)
        (gate, factor), (of_gate, of_factor) = made.chunk(2, dim=1), of_made.chunk(2, dim=1)
        torch.mul(of_inner, opened, out=of_factor)
        _aten.gelu_backward.grad_input(of_inner.mul_(factor), gate, approximate="tanh", grad_input=of_gate)
        del kept[-4:]
        of_inputs = of_made @ self.wi.weight
        return norm_gradient(of_inputs, states, self.norm.weight, scale).add_(gradient)


class SideBySide:
    """Linear layers whose weights are one matrix, one below the other: their memory is one piece from the first use on.

    Under ZeRO-3 it always is: a block's matrices are gathered as one.
    """

    def __init__(self, *layers: nn.Linear):
        self._layers = layers
        self._shape = (sum(layer.out_features for layer in layers), layers[0].in_features)

    @property
    def weight(self) -> Tensor:
        if not self._is_one_piece():
            self._join()
        first = self._layers[0].weight
        return first.as_strided(self._shape, first.stride())

    def _is_one_piece(self) -> bool:
        """Whether each begins where the one before ends, all in the memory that the first is in."""
        first, *others = (layer.weight for layer in self._layers)
        end = first.data_ptr() + first.nbytes
        for weight in others:
            if weight.data_ptr() != end:
                return False
            end += weight.nbytes
        memory = first.untyped_storage()
        return end <= memory.data_ptr() + memory.nbytes()

    def _join(self) -> None:
        weights = [layer.weight for layer in self._layers]
        together = torch.cat([weight.data for weight in weights])
        for weight, its in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
            weight.data = its
