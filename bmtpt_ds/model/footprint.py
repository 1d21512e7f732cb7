"""Bytes that an architecture needs; so far, what the backward pass keeps of a token."""

from transformers import T5Config


def activation_bytes_per_token(config: T5Config, *, bytes_per_value: int, checkpointing: bool, length: int) -> int:
    """Upper estimate of the memory that one encoder token of a forward pass holds until the backward pass.

    A block keeps its input and normalised input twice, query, key, value and the attention's output, the feed-forward's
    inner values (each about three times, for the activation function and the gate), and in attention without a fused
    kernel a row of scores of every head, twice. Checkpointing keeps each block's input and one block's activations.

    Args:
        length: encoder tokens of the row, prompt included; a token's scores span all of them.
    """
    inner = config.num_heads * config.d_kv
    gates = 2 if config.is_gated_act else 1
    block = 6 * config.d_model + 5 * inner + 3 * (1 + gates) * config.d_ff + 2 * config.num_heads * length
    kept = config.d_model * config.num_layers + block if checkpointing else block * config.num_layers
    return kept * bytes_per_value
