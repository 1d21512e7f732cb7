"""Floating-point operations of a row's passes through a frozen T5: what must be done, and is.

A frozen linear layer has no gradient of weights: its backward pass is one product, as its forward pass, not two.
Attention's products of activations have both gradients, so there the backward pass is two of each. Activation
checkpointing adds the blocks' forward pass. Norms, softmax, biases and activations are left out (1% and less), and so
is what fused attention kernels compute anew.

Symbols: H hidden size, I inner size (heads times values of one), F feed-forward size, S encoder tokens of a row (prompt
included), T target tokens, V vocabulary. A product of [m, k] and [k, n] is 2 m k n operations.
"""

from typing import NamedTuple

from bmtpt_ds.model_folder import Architecture


class Flops(NamedTuple):
    """Of a row, or of a sum of rows."""

    forward: int
    backward: int  # activation gradients alone
    recompute: int  # in the backward pass, with activation checkpointing; else 0

    @property
    def model(self) -> int:
        """What the step cannot do without: recomputation is not counted."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        return sum(self)

    def plus(self, other: "Flops") -> "Flops":
        return Flops(*(own + more for own, more in zip(self, other, strict=True)))


def row_flops(
    architecture: Architecture, source_tokens: int, target_tokens: int, *, checkpointing: bool = False, on_cpu: bool
) -> Flops:
    """
    Args:
        source_tokens: S of the row.
        target_tokens: T of the row.
        on_cpu: few target tokens attend to the encoder's without keys and values of these (`frozen.CrossAttention`).
    """
    a, S, T = architecture, source_tokens, target_tokens
    of_token = 4 * a.inner_size + (3 if a.gated else 2) * a.feed_forward_size  # times 2 H: self-attention, feed-forward
    linear = 2 * a.hidden_size * of_token * (a.encoder_blocks * S + a.decoder_blocks * T)
    attention = 4 * a.inner_size * (a.encoder_blocks * S * S + a.decoder_blocks * T * T)  # scores, and their use
    cross = _cross_attention(a, S, T, folded=on_cpu and a.inner_size // a.heads >= 2 * T)
    linear += a.decoder_blocks * cross.linear
    attention += a.decoder_blocks * cross.attention
    # labels do not follow from the prompt: nothing goes back through the first block's self-attention and queries
    untouched = 8 * T * a.hidden_size * a.inner_size + 8 * T * T * a.inner_size + cross.of_queries
    forward, head = linear + attention, 2 * T * a.hidden_size * a.vocab_size
    return Flops(forward + head, linear + 2 * attention - untouched + head, forward if checkpointing else 0)


class _Cross(NamedTuple):
    """Of a decoder block's attention over the encoder."""

    linear: int
    attention: int  # products of activations
    of_queries: int  # what their gradient takes


def _cross_attention(a: Architecture, S: int, T: int, *, folded: bool) -> _Cross:
    product = 2 * T * a.hidden_size * a.inner_size  # of queries, or of the output
    if folded:  # the weights of keys and values go to the queries, which then attend with H values a head
        scores = 2 * T * S * a.heads * a.hidden_size
        return _Cross(4 * product, 2 * scores, 2 * product + scores)
    scores = 2 * T * S * a.inner_size
    return _Cross(2 * product + 4 * S * a.hidden_size * a.inner_size, 2 * scores, product + scores)
