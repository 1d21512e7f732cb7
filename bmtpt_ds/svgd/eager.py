"""The backend that runs anywhere: reference.py's direction and torch's arithmetic, one operation after another."""

import torch
from torch import Tensor

from . import reference
from .backend import Diagnostics, KernelOptions, Update
from .reference import Direction


class Eager:
    """No function of it reads a value back from the device, so the host runs ahead of it."""

    def direction(self, particles: Tensor, scores: Tensor, options: KernelOptions) -> Direction:
        return reference.direction(particles, scores.to(particles.dtype), *options)

    def step_(
        self, particles: Tensor, scores: Tensor, state: dict[str, Tensor], options: KernelOptions, update: Update
    ) -> Diagnostics:
        scores = scores.to(particles.dtype)
        finite = torch.isfinite(scores).all()
        if update.clip_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
            scores = scores * (update.clip_norm / (torch.linalg.vector_norm(scores) + 1e-6)).clamp(max=1.0)
        svgd = reference.direction(particles, scores, *options)

        step = state["step"] + 1
        decayed = particles * (1 - update.lr * update.weight_decay)
        if update.adaptive:
            moved, moments = _adam(decayed, -svgd.direction, state, step, update)
        else:
            moved, moments = decayed + update.lr * svgd.direction, {}

        # Everything is computed, then kept or not on the device: a branch here would wait for it.
        particles.copy_(torch.where(finite, moved, particles))
        for name, new in (moments | {"step": step}).items():
            state[name].copy_(torch.where(finite, new, state[name]))
        skipped = state["skipped"].add_(~finite)
        mean = _mean_off_diagonal(svgd.kernel)
        return Diagnostics(svgd.bandwidth, svgd.damping, mean, svgd.drive_norm, svgd.repulsion_norm, skipped)

    def describe(self, particles: Tensor) -> str:
        return f"reference, in torch on {particles.device}"


def _adam(
    particles: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor, update: Update
) -> tuple[Tensor, dict[str, Tensor]]:
    """The moved particles and the new moments. The order of operations is torch.optim.AdamW's."""
    beta1, beta2 = update.betas
    exp_avg = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
    exp_avg_sq = (state["exp_avg_sq"] * beta2).addcmul(gradient, gradient, value=1 - beta2)
    step = step.double()  # 0-d: does not promote the moments, and 1 - beta2**step keeps its digits
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = exp_avg_sq.sqrt() / correction2.sqrt() + update.eps
    moved = particles.addcdiv(exp_avg * -(update.lr / correction1), denominator)
    return moved, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    M = len(kernel)
    if M == 1:
        return torch.ones_like(kernel[0, 0])
    # zeroed, not subtracted: where particles lie far apart the entries are far below the rounding of the diagonal
    return kernel.clone().fill_diagonal_(0).sum() / (M * (M - 1))
