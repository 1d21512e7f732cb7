"""Where Triton's kernels run: SVGD's, and attention's within T5."""

import os
from importlib.util import find_spec

import torch

_OLDEST = (8, 0)  # compute capability: the first that multiplies bfloat16


def why_no_kernels(device: torch.device) -> str | None:
    """What keeps Triton's kernels from a device; None if nothing does."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if is_interpreted():
        return None if device.type == "cpu" else f"kernels are interpreted, on the CPU, not on {device}"
    if device.type != "cuda" or torch.version.hip:
        return f"{'an AMD GPU' if device.type == 'cuda' else device.type} is not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program after another."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def power_of_two(n: int) -> int:
    """The smallest one that is not below n >= 1: a tile's sides are such."""
    return 1 << (n - 1).bit_length()
