"""Bytes that an architecture needs: its weights, and what a row's forward pass keeps for the backward pass.

The parts of a block are functions of their own: what one keeps follows from the operations of `packed.py`, `frozen.py`,
`whole_block.py` and transformers' T5, and a test compares the sum with what autograd saves. Frozen linear layers keep
nothing of their input. Left out: masks of dropout (a byte a value), and what a backward pass holds besides.

Symbols: H hidden size, S encoder tokens of a row (prompt included), T target tokens, V vocabulary.
"""

from bmtpt_ds.model_folder import Architecture

_FLOAT32 = 4  # bytes
_ALIGNED = 16  # values; a row of the position bias


def weight_bytes(architecture: Architecture, bytes_per_value: int) -> int:
    """Of all parameters."""
    return architecture.parameters * bytes_per_value


def row_bytes(
    architecture: Architecture,
    *,
    bytes_per_value: int,
    checkpointing: bool,
    source_tokens: int,
    target_tokens: int,
    taught: bool = False,
) -> int:
    """Upper estimate of what a row's forward pass holds until its backward pass, logits included.

    Checkpointing keeps each block's input and, while its backward pass runs, what one block keeps.

    Args:
        source_tokens: S of the row.
        target_tokens: T of the row.
        taught: whether it is compared with what a teacher makes of it (MPT): the teacher's logits and last states, and
            in float32 what their distance is computed of.
    """
    kept = kept_bytes(
        architecture,
        bytes_per_value=bytes_per_value,
        checkpointing=checkpointing,
        source_tokens=source_tokens,
        target_tokens=target_tokens,
    )
    logits = target_tokens * architecture.vocab_size
    kept += logits * (bytes_per_value + _FLOAT32)  # also in float32
    if taught:
        states = (source_tokens + target_tokens) * architecture.hidden_size
        kept += logits * (bytes_per_value + 5 * _FLOAT32) + states * (bytes_per_value + 2 * _FLOAT32)
    return kept


def kept_bytes(
    architecture: Architecture, *, bytes_per_value: int, checkpointing: bool, source_tokens: int, target_tokens: int
) -> int:
    """As `row_bytes`, but only what autograd saves: without the logits, which live for a moment."""
    size, sources, targets = bytes_per_value, source_tokens, target_tokens
    encoder = sources * (_norm(architecture, size) + _self_attention(architecture, size))
    encoder += sources * (_norm(architecture, size) + _feed_forward(architecture, size))
    decoder = targets * (_norm(architecture, size) + _self_attention(architecture, size))
    decoder += targets * _norm(architecture, size) + _cross_attention(architecture, size, sources, targets)
    decoder += targets * (_norm(architecture, size) + _feed_forward(architecture, size))
    around = (sources + targets) * _norm(architecture, size)  # the stacks' last norms
    around += architecture.heads * sources * (-(-sources // _ALIGNED) * _ALIGNED) * size  # a bias for all blocks
    around += targets * architecture.vocab_size * _FLOAT32  # log-softmax
    if not checkpointing:
        return around + architecture.encoder_blocks * encoder + architecture.decoder_blocks * decoder
    inputs = architecture.encoder_blocks * sources + architecture.decoder_blocks * targets
    inputs += sources  # the encoder's output
    return around + inputs * architecture.hidden_size * size + max(encoder, decoder)


def _norm(architecture: Architecture, size: int) -> int:
    """A token's input, and one over its root mean square."""
    return architecture.hidden_size * size + _FLOAT32


def _self_attention(architecture: Architecture, size: int) -> int:
    """A token's query, key, value and output, and a sum a head: the fused kernels keep no scores."""
    return 4 * architecture.inner_size * size + architecture.heads * _FLOAT32


def _cross_attention(architecture: Architecture, size: int, sources: int, targets: int) -> int:
    """The query and output of the row's target tokens, key and value of its encoder tokens (none of these on a CPU)."""
    of_target = 2 * architecture.inner_size * size + architecture.heads * _FLOAT32
    return targets * of_target + sources * 2 * architecture.inner_size * size


def _feed_forward(architecture: Architecture, size: int) -> int:
    """A token's inner values: ReLU keeps them once; a gate GELU's input and output, and the other factor."""
    return (3 if architecture.gated else 1) * architecture.feed_forward_size * size
