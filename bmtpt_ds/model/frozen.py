"""What frozen weights spare: T5's layers with less to compute and less to keep for the backward pass, same values.

The weights stay where transformers put them, each used by the forward pass of its own module and saved for the backward
pass as the parameter itself: ZeRO-3 gathers it there and takes it away again.

Symbols: H hidden size, d values of a head, N rows of a span, Q query tokens and K key tokens of a row.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5DenseGatedActDense, T5LayerNorm

from bmtpt_ds.model.norm import FrozenNorm
from bmtpt_ds.model.packed import Spans, kind_of
from bmtpt_ds.model.whole_block import Layers, can_be_whole, run_whole
from bmtpt_ds.triton_support import why_no_kernels

# Where blocks run whole. A CPU has its own ways of sparing work, in the layers below; wider numbers do not go through a
# GPU's matrix units, and are for checks.
WHOLE = frozenset({("cuda", torch.bfloat16)})


def use_frozen_layers(model: nn.Module) -> None:
    """Makes a frozen T5's norms, GELU and attention over the encoder those of this file, in place."""
    for module in list(model.modules()):
        if type(module) is T5LayerNorm:
            module.__class__ = FrozenNorm
        elif type(module) is T5Attention and kind_of(module) == "cross":
            module.__class__ = CrossAttention
            module.k.__class__ = module.v.__class__ = HeadwiseLinear
        elif isinstance(module, T5DenseGatedActDense) and isinstance(module.act, NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")  # one kernel that keeps its input; theirs is eight and keeps four
    for block in model.modules():
        if type(block) is T5Block and can_be_whole(block):
            block.forward = partial(_block_forward, block, Layers(block))


def runs_whole(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks run whole on such states; asked once a call of the model."""
    return (device.type, dtype) in WHOLE and not why_no_kernels(device)


def use_trainable_layers(model: nn.Module) -> None:
    """Takes `use_frozen_layers` back, in place: this file's layers give no gradient to weights, transformers' do.

    The GELU stays, it has no weights.
    """
    theirs = {FrozenNorm: T5LayerNorm, CrossAttention: T5Attention, HeadwiseLinear: nn.Linear}
    for module in model.modules():
        module.__class__ = theirs.get(type(module), type(module))
        if type(module) is T5Block:
            vars(module).pop("forward", None)


def _block_forward(
    block: T5Block,
    layers: Layers,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    *others,
    spans: Spans | None = None,
    **named,
) -> tuple[torch.Tensor, ...]:
    """A block's forward pass: packed rows on a GPU as one node of autograd, all else as transformers does it."""
    dropout = block.training and layers.attentions[0].attention.dropout
    if spans is not None and spans.whole and not dropout:
        return run_whole(layers, hidden_states, encoder_hidden_states, spans), position_bias
    named |= {} if spans is None else {"spans": spans}
    return T5Block.forward(block, hidden_states, mask, position_bias, encoder_hidden_states, *others, **named)


def use_sharded_layers(model: nn.Module) -> None:
    """Makes the linear layers of a frozen T5 `ShardedLinear`, in place: after `use_frozen_layers`."""
    theirs = {nn.Linear: ShardedLinear, HeadwiseLinear: _ShardedHeadwiseLinear}
    for module in model.modules():
        module.__class__ = theirs.get(type(module), type(module))


def train_only(model: nn.Module, trained: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """Freezes all parameters but those whose names are `trained`; these, in the order of the model."""
    found = {}
    for name, parameter in model.named_parameters():  # a shared one comes once, under its first name
        parameter.requires_grad_(trained(name))
        if parameter.requires_grad:
            found[name] = parameter
    return found


class HeadwiseLinear(nn.Linear):
    """A linear layer whose output is the heads' values, which can also be used a head at a time, either way round."""

    def forward(self, states: torch.Tensor, to_heads: bool | None = None) -> torch.Tensor:
        """
        Args:
            to_heads: None: states [..., H] -> [..., heads * d]. True: [heads, tokens, H] -> [heads, tokens, d], each
                head's part of the weights on its own states. False: the transposed parts, from d to H.
        """
        return super().forward(states) if to_heads is None else _PerHead.apply(states, self.weight, to_heads)


class _PerHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, to_heads: bool) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.to_heads = to_heads
        parts = weight.view(len(states), -1, weight.shape[-1])  # [heads, d, H]
        return states @ (parts.mT if to_heads else parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        parts = weight.view(len(gradient), -1, weight.shape[-1])
        return gradient @ (parts if ctx.to_heads else parts.mT), None, None


class ShardedLinear(nn.Linear):
    """A linear layer whose weights may be elsewhere between forward and backward pass.

    Autograd's own keeps a view of the weights, which keeps their memory; here the tensor itself is kept, whose owner
    may take the memory away and bring it back. Nothing else is: weights are frozen.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            return _Linear.apply(states, self.weight)
        return super().forward(states)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(states, weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None


class _ShardedHeadwiseLinear(HeadwiseLinear, ShardedLinear):
    """Both."""


class CrossAttention(T5Attention):
    """Attention of few target tokens over the encoder's many, which makes no keys and values of these.

    q . (W_k e) = (W_k^T q) . e and sum_j a_j W_v e_j = W_v sum_j a_j e_j: the weights go to the few queries and to
    what they attend to rather than to every encoder token, in each decoder layer. That is a seventh of the model's
    work on a long text with a short answer. On a GPU keys and values are made as usual: its matrix units do that at
    full speed, attention with H values a key they do not.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,  # [1, queries of all rows, H]
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,  # [1, keys of all rows, H]
        position_bias: torch.Tensor | None = None,
        past_key_values=None,
        *,
        spans: Spans | None = None,
        **others,
    ):
        if spans is None or hidden_states.is_cuda or not self._few(spans):
            return super().forward(
                hidden_states, mask, key_value_states, position_bias, past_key_values, spans=spans, **others
            )
        queries = self.q(hidden_states)[0].unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
        queries = self.k(queries, False).split([span.rows * span.queries for span in spans.cross], dim=1)
        encoded = key_value_states[0].split([span.rows * span.keys for span in spans.cross])
        dropout = self.dropout if self.training else 0.0
        attended = []
        for span, query, states in zip(spans.cross, queries, encoded, strict=True):
            query = query.unflatten(1, (span.rows, -1)).transpose(0, 1).flatten(1, 2)  # [N, heads * Q, H]
            states = states.unflatten(0, (span.rows, -1))  # [N, K, H]
            bias = None if span.bias is None else span.bias[:, 0]
            found = scaled_dot_product_attention(
                query, states, states, attn_mask=bias, dropout_p=dropout, scale=self.scaling
            )
            attended.append(found.unflatten(1, (self.n_heads, -1)).transpose(0, 1).flatten(1, 2))
        values = self.v(torch.cat(attended, dim=1), True)  # [heads, queries of all rows, d]
        return self.o(values.transpose(0, 1).flatten(1)[None]), position_bias, None

    def _few(self, spans: Spans) -> bool:
        """Whether attention with H values a key (for each of a row's heads * Q) costs less than making keys and values
        and attending with d."""
        return all(2 * span.queries <= self.key_value_proj_dim for span in spans.cross)
