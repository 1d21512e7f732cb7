"""What svgd_direction and svgd_step_ accept. Every refusal is a ValueError of one line that names the argument.

Only shapes, dtypes, devices and Python numbers are looked at, never a value on an accelerator: the host would wait.
"""

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

BANDWIDTHS = ("median_log", "median", "printed")
DAMPINGS = ("paper", "matched", "none")
# the [M, D] tensors of an optimizer's state
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def check_particles(particles: Tensor) -> None:
    """[M, D], neither empty, float32 or float64: a bf16 step is lost beside a prompt of magnitude 11 or more."""
    if particles.ndim != 2 or particles.numel() == 0:
        raise ValueError(f"particles must be [M, D] with M, D >= 1, not of shape {tuple(particles.shape)}")
    if particles.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"particles must be float32 or float64, not {particles.dtype}")


def check_scores(scores: Tensor, particles: Tensor) -> None:
    """As the particles; any floating dtype."""
    if scores.shape != particles.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, but particles {tuple(particles.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, not {scores.dtype}")
    if scores.device != particles.device:
        raise ValueError(f"scores are on {scores.device}, but particles on {particles.device}")


def check_kernel_options(bandwidth: str | float, damping: str | float, repulsion_scale: float) -> None:
    """One of the names, or a number above 0 (bandwidth) or in (0, 1] (damping)."""
    if bandwidth not in BANDWIDTHS and not (_is_number(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be one of {', '.join(BANDWIDTHS)} or a number above 0, not {bandwidth!r}")
    if damping not in DAMPINGS and not (_is_number(damping) and 0 < damping <= 1):
        raise ValueError(f"damping must be one of {', '.join(DAMPINGS)} or a number in (0, 1], not {damping!r}")
    if not (_is_number(repulsion_scale) and repulsion_scale >= 0):
        raise ValueError(f"repulsion_scale must be a number, 0 or more, not {repulsion_scale!r}")


def check_optimizer(optimizer: str) -> None:
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer must be one of {', '.join(MOMENTS)}, not {optimizer!r}")


def check_optimizer_options(
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    score_scale: float,
) -> None:
    """lr a number or a 0-d tensor, whose value is looked at only where it lies on the CPU."""
    if isinstance(lr, Tensor):
        if lr.ndim != 0:
            raise ValueError(f"lr must be a number or a 0-d tensor, not of shape {tuple(lr.shape)}")
        number = lr.item() if lr.device.type == "cpu" else 0.0
    else:
        number = lr
    if not (_is_number(number) and number >= 0):
        raise ValueError(f"lr must be a number, 0 or more, not {number!r}")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), not {betas!r}")
    if not (_is_number(eps) and eps >= 0):
        raise ValueError(f"eps must be a number, 0 or more, not {eps!r}")
    if not (_is_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a number, 0 or more, not {weight_decay!r}")
    if clip_norm is not None and not (_is_number(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm must be None or a number above 0, not {clip_norm!r}")
    if not _is_number(score_scale):
        raise ValueError(f"score_scale must be a finite number, not {score_scale!r}")


def check_state(state: Mapping[str, Tensor], optimizer: str, particles: Tensor) -> None:
    """The tensors of init_state(particles, optimizer), by name, shape and device."""
    shapes = dict.fromkeys(MOMENTS[optimizer], particles.shape) | dict.fromkeys(("step", "skipped"), ())
    if state.keys() != shapes.keys():
        raise ValueError(f"state for {optimizer} must hold {', '.join(shapes)}, not {', '.join(state) or 'nothing'}")
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"state {name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.device != particles.device:
            raise ValueError(f"state {name} is on {tensor.device}, but particles on {particles.device}")
        if name in MOMENTS[optimizer] and tensor.dtype != particles.dtype:
            raise ValueError(f"state {name} is {tensor.dtype}, but particles are {particles.dtype}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
