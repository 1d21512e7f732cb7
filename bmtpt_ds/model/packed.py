"""T5's blocks over rows of several lengths, one behind the other as one sequence: nothing is padded to the longest.

Linear layers and norms see tokens, whatever row they belong to; attention alone looks at one bucket of rows of equal
length after the other. What is the same in all layers (position bias, masks) is built once a call.

Symbols: N rows of a bucket, Q query tokens and K key tokens of a row, d values of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from bmtpt_ds.triton_support import power_of_two

ATTENTION = "packed"  # the name in transformers' registry
_ALIGNED = 16  # values; a row of a bias that begins elsewhere is copied by CUDA's kernels


@dataclass(frozen=True)
class Span:
    """Rows of one shape among the packed tokens: queries [N * Q], keys [N * K]."""

    rows: int
    queries: int  # tokens of a row
    keys: int  # tokens of a row
    position: torch.Tensor | None = None  # added to the scores of a text, [1, heads, at least Q, at least K]
    mask: torch.Tensor | None = None  # [N, K], 1 at tokens, which come first; None: nothing is padding
    padding: torch.Tensor | None = None  # the same as a bias, [N, 1, 1, K]
    texts: int = 1  # equally long ones in a row's queries, one behind the other, that do not see each other

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """What is added to the scores; broadcasts to [N, heads, Q, K]."""
        if self.position is None:
            return self.padding
        length = self.queries // self.texts
        return together(repeated_bias(self.position[..., :length, :length], self.texts), self.padding)


@dataclass(frozen=True)
class Spans:
    """Where the rows lie, for each kind of attention."""

    encoder: Sequence[Span] = ()
    decoder: Sequence[Span] = ()
    cross: Sequence[Span] = ()
    whole: bool = False  # whether blocks run as one node of autograd
    tilings: dict[str, Any] = field(default_factory=dict)  # what `attention.py` makes of each, for all layers

    def of(self, attention: T5Attention) -> Sequence[Span]:
        return getattr(self, kind_of(attention))


def kind_of(attention: T5Attention) -> Literal["encoder", "decoder", "cross"]:
    if not attention.is_decoder:
        return "encoder"
    return "decoder" if attention.is_causal else "cross"


def packed_attention(
    module: T5Attention,
    query: torch.Tensor,  # [1, heads, queries of all rows, d]
    key: torch.Tensor,  # [1, heads, keys of all rows, d]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    spans: Spans | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Attention within each row; without `spans` that of transformers over a padded batch.

    Returns:
        [1, queries of all rows, heads, d], and no weights.
    """
    if spans is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    chosen = spans.of(module)
    # one split rather than slices: its backward pass puts the parts together once
    queries = query[0].transpose(0, 1).split([span.rows * span.queries for span in chosen])
    sizes = [span.rows * span.keys for span in chosen]
    keys, values = (states[0].transpose(0, 1).split(sizes) for states in (key, value))
    outputs = []
    for span, *states in zip(chosen, queries, keys, values, strict=True):
        q, k, v = (part.unflatten(0, (span.rows, -1)).transpose(1, 2) for part in states)  # [N, heads, tokens, d]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=span.bias, dropout_p=dropout, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def through_blocks(
    stack: T5Stack, hidden: torch.Tensor, spans: Spans, encoded: torch.Tensor | None = None
) -> torch.Tensor:
    """The packed tokens [1, tokens, H] after all blocks of encoder or decoder.

    Args:
        encoded: [1, encoder tokens, H], for a decoder.
    """
    hidden = stack.dropout(hidden)
    elsewhere = hidden.new_zeros(())  # in the biases' place: a layer that gets none computes its own
    for block in stack.block:
        # positions, as transformers does it: activation checkpointing follows gradients through these alone
        hidden, *_ = block(hidden, None, elsewhere, encoded, None, elsewhere, spans=spans)
    return stack.dropout(stack.final_layer_norm(hidden))


def put_in(prompts: torch.Tensor, texts: torch.Tensor, numbers: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    """What the encoder reads, [E, H]: prompts where they belong, texts elsewhere.

    Args:
        prompts: [P, L, H]; gets a gradient, added up in a fixed order.
        texts: [E, H].
        numbers: [E], which of the P * L prompt tokens stands there, or -1.
        begins: [P, rows], where in E the prompt begins for each of its rows, or -1.
    """
    return _PutIn.apply(prompts, texts, numbers, begins)


class _PutIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, prompts: torch.Tensor, texts: torch.Tensor, numbers: torch.Tensor, begins: torch.Tensor
    ) -> torch.Tensor:
        ctx.length, ctx.dtype = prompts.shape[1], prompts.dtype
        ctx.save_for_backward(begins)
        tokens = prompts.flatten(0, 1).to(texts.dtype)[numbers.clamp(min=0)]
        return torch.where(numbers[:, None] >= 0, tokens, texts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (begins,) = ctx.saved_tensors
        tokens = torch.arange(ctx.length, device=begins.device, dtype=begins.dtype)
        of_rows = gradient[begins.clamp(min=0)[..., None] + tokens].to(ctx.dtype)  # [P, rows, L, H]
        return of_rows.masked_fill_(begins[..., None, None] < 0, 0).sum(dim=1), None, None, None


def position_bias(stack: T5Stack, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """The relative position bias of rows of up to so many tokens, [1, heads, tokens, tokens], causal in a decoder.

    Args:
        like: gives dtype and device.

    Shorter rows take the upper left part.
    """
    attention = stack.block[0].layer[0].SelfAttention
    width = -(-tokens // _ALIGNED) * _ALIGNED
    reach = power_of_two(width)
    buckets = _relative_buckets(
        reach,
        like.device,
        bidirectional=not stack.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    # it follows from the distance alone, so what a query sees is a window of one line: the first query's begins last
    ahead = 1 if stack.is_decoder else width
    line = attention.relative_attention_bias(buckets[reach + 1 - tokens : reach + ahead]).to(like.dtype).t()
    if stack.is_decoder:
        line = pad(line, (0, width - 1), value=torch.finfo(like.dtype).min)
    return line.unfold(1, width, 1).flip(1).contiguous()[None, ..., :tokens]


@lru_cache(maxsize=16)
def _relative_buckets(reach: int, device: torch.device, **of_model: int) -> torch.Tensor:
    """T5's number for each distance of a key behind a query, from -reach to reach - 1: the same in every step."""
    return T5Attention._relative_position_bucket(torch.arange(-reach, reach, device=device), **of_model)


def repeated_bias(bias: torch.Tensor, times: int) -> torch.Tensor:
    """The bias [1, heads, Q, Q] of so many texts one behind the other that do not see each other."""
    if times == 1:
        return bias
    heads, length = bias.shape[1], bias.shape[-1]
    among = bias.new_full((1, heads, times, length, times, length), torch.finfo(bias.dtype).min)
    for i in range(times):
        among[:, :, i, :, i] = bias
    return aligned(among.view(1, heads, times * length, times * length))


def padding_bias(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Keeps padded keys out: a bias [N, 1, 1, K] of a mask [N, K], 1 at tokens."""
    return aligned((1 - mask[:, None, None].to(like.dtype)) * torch.finfo(like.dtype).min)


def together(bias: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The sum of a position bias and a padding bias, where there is one."""
    return bias if padding is None else aligned(bias + padding)


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same values, for a GPU with rows that begin where its kernels want them."""
    if not bias.is_cuda or bias.stride(-2) % _ALIGNED == 0:
        return bias
    keys = bias.shape[-1]
    return pad(bias, (0, -keys % _ALIGNED))[..., :keys]
