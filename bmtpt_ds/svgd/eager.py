"""The backend that runs anywhere: reference.py's direction and torch's arithmetic, one operation after another."""

import torch
from torch import Tensor

from bmtpt_ds.optimizer import adam

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
        scores = scores.to(particles.dtype) * update.score_scale
        finite = torch.isfinite(scores).all()
        if update.clip_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
            scores = scores * (update.clip_norm / (torch.linalg.vector_norm(scores) + 1e-6)).clamp(max=1.0)
        svgd = reference.direction(particles, scores, *options)

        step = state["step"] + 1
        decayed = particles * (1 - update.lr * update.weight_decay)
        if update.adaptive:
            old = (state["exp_avg"], state["exp_avg_sq"])
            moved, *new = adam(decayed, -svgd.direction, *old, step, lr=update.lr, betas=update.betas, eps=update.eps)
            moments = dict(zip(("exp_avg", "exp_avg_sq"), new, strict=True))
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


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    M = len(kernel)
    if M == 1:
        return torch.ones_like(kernel[0, 0])
    # zeroed, not subtracted: where particles lie far apart the entries are far below the rounding of the diagonal
    return kernel.clone().fill_diagonal_(0).sum() / (M * (M - 1))
