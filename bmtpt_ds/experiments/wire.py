"""Bytes and seconds that collectives take: of a step's particles and, under ZeRO-3, of the weights. No torch.

Rings, as NCCL and gloo form them for large messages: every rank sends to its neighbour, all at once, so what passes
through a rank passes through each link, and the slowest one sets the pace. Small messages go by trees.
"""

import math

_FLOAT32 = 4  # bytes


def particle_traffic(gradients: int, moved: int, data_ranks: int, particle_ranks: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, of so many numbers of gradients, and that rank 0 moves (`parallel.Grid`).

    `gradients`: the all-reduce over the data ranks of a block of prompts and the all-gather over the blocks; `prompts`:
    what rank 0 has moved, which goes on from rank to rank.
    """
    block = gradients * _FLOAT32 // particle_ranks
    reduced = 2 * (data_ranks - 1) * block // data_ranks
    alone = data_ranks * particle_ranks == 1
    return {
        "gradients": reduced + (particle_ranks - 1) * block,
        "prompts": 0 if alone else moved * _FLOAT32,
    }


def tree_depth(ranks: int) -> int:
    """Hops from one rank to all others."""
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


def all_reduce_seconds(size: float, ranks: int, bytes_per_second: float, latency: float) -> float:
    """Of `size` bytes on each of so many ranks."""
    return 2 * (ranks - 1) / ranks * size / bytes_per_second + 2 * tree_depth(ranks) * latency


def broadcast_seconds(size: float, ranks: int, bytes_per_second: float, latency: float) -> float:
    """Of `size` bytes from one rank to so many."""
    return (size / bytes_per_second if ranks > 1 else 0.0) + tree_depth(ranks) * latency


def all_gather_seconds(size: float, ranks: int, bytes_per_second: float, latency: float) -> float:
    """Of `size` bytes, of which each of so many ranks has its part."""
    return (ranks - 1) / ranks * size / bytes_per_second + tree_depth(ranks) * latency
