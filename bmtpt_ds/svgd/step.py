"""A sampler is a pure direction and a step over a named state: svgd_direction, init_state, svgd_step_.

Symbols: M particles, D numbers in a particle (prompt length times hidden size). No function here reads a value back
from the device, so the host runs ahead of it; what a caller may want to know comes back as tensors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .reference import Direction


class Diagnostics(NamedTuple):
    """What a step was made of: 0-d tensors on the particles' device. Norms run over all M * D entries."""

    bandwidth: Tensor  # h, a squared distance; 1 where M = 1
    damping: Tensor  # lambda
    kernel_mean: Tensor  # mean of K off its diagonal; near 0 the particles ignore each other; 1 where M = 1
    drive_norm: Tensor  # norm of 1/M K_l @ score, after clipping; not finite in a skipped step
    repulsion_norm: Tensor  # norm of the repulsion's part of phi
    skipped: Tensor  # int64, steps skipped so far because a score was not finite


class Backend(NamedTuple):
    """One way to compute the two public functions; both get checked arguments, scores in the particles' dtype."""

    direction: Callable[..., Direction]  # (particles, scores, **kernel options)
    step_: Callable[..., Diagnostics]  # (particles, scores, state, *, optimizer options, **kernel options)


@torch.no_grad()
def svgd_direction(
    particles: Tensor,
    scores: Tensor,
    *,
    bandwidth: str | float = "median_log",
    damping: str | float = "paper",
    repulsion_scale: float = 1.0,
    backend: str = "auto",
) -> Direction:
    """The damped SVGD direction phi (Appendix B of the paper; Liu and Wang 2016, Ba et al. 2022).

    Args:
        particles: [M, D] float32 or float64, a flattened prompt a row. Not changed.
        scores: [M, D] any floating dtype, grad log p(particle); computed with in the particles' dtype.
        bandwidth: how h, a squared distance, follows from the squared distances of the pairs: `median_log` (median /
            log(M + 1)), `median`, `printed` (median squared / log(M + 1), as B.3 has it), or h itself. At least 1e-12.
        damping: lambda, the weight of a particle's own score: `paper` (min(1, (1 + M/D) / e)), `matched` ((1 + c M/D) /
            e^c with c = median / h), `none` (1), or a number in (0, 1]. M = 1 makes it 1 whatever is asked for.
        repulsion_scale: factor of the repulsion; 1 is the paper, 0 leaves the averaged scores alone.
        backend: `auto` or a key of BACKENDS.

    Returns:
        Direction: `.direction` [M, D], along which to move the particles; `.kernel` [M, M], K with ones on its diagonal
        (lambda is not in it); 0-d `.bandwidth`, `.damping`, `.drive_norm`, `.repulsion_norm`.

    Raises:
        ValueError: a wrong shape, dtype, device or option, by name.
    """
    kernel = {"bandwidth": bandwidth, "damping": damping, "repulsion_scale": repulsion_scale}
    checks.check_particles(particles)
    checks.check_scores(scores, particles)
    checks.check_kernel_options(**kernel)
    return _pick(backend).direction(particles, scores.to(particles.dtype), **kernel)


def init_state(particles: Tensor, optimizer: str) -> dict[str, Tensor]:
    """The state of a fresh run, beside the particles [M, D]: a plain dict of tensors, fit for safetensors.

    `step` and `skipped` (0-d int64: steps taken, steps skipped); for `adamw` and `adam` also the moments `exp_avg` and
    `exp_avg_sq` [M, D] in the particles' dtype. Raises ValueError on an unknown optimizer or ill-shaped particles.
    """
    checks.check_particles(particles)
    checks.check_optimizer(optimizer)
    moments = {name: torch.zeros_like(particles, requires_grad=False) for name in checks.MOMENTS[optimizer]}
    counters = {name: torch.zeros((), dtype=torch.int64, device=particles.device) for name in ("step", "skipped")}
    return moments | counters


@torch.no_grad()
def svgd_step_(
    particles: Tensor,
    scores: Tensor,
    state: dict[str, Tensor],
    *,
    optimizer: str = "adamw",
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    bandwidth: str | float = "median_log",
    damping: str | float = "paper",
    repulsion_scale: float = 1.0,
    backend: str = "auto",
) -> Diagnostics:
    """Moves the particles one step along phi, in place (Algorithm 1 of the paper, upper half).

    Scores with an inf or a nan anywhere skip the step: particles and state keep every bit, but for `skipped`, which
    goes up by one. The host does not wait to find out.

    Args:
        particles: [M, D] float32 or float64, changed in place.
        scores: [M, D] any floating dtype, grad log p(particle).
        state: of init_state for this optimizer, changed in place.
        optimizer: `adamw` (torch.optim.AdamW fed with the gradient -phi), `adam` (adamw with weight decay 0, whatever
            `weight_decay` says) or `sgd` (particles += lr * phi).
        lr: learning rate of this step, a number or a 0-d tensor.
        betas, eps: of adamw and adam.
        weight_decay: decoupled, for adamw and sgd: particles *= 1 - lr * weight_decay before the move.
        clip_norm: scales the scores down to this joint norm over all particles, before phi; None does not clip.
        bandwidth, damping, repulsion_scale, backend: as for svgd_direction.

    Returns:
        Diagnostics, 0-d tensors on the device.

    Raises:
        ValueError: a wrong shape, dtype, device or option, by name; nothing has changed then.
    """
    kernel = {"bandwidth": bandwidth, "damping": damping, "repulsion_scale": repulsion_scale}
    rule = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_norm": clip_norm}
    checks.check_particles(particles)
    checks.check_scores(scores, particles)
    checks.check_kernel_options(**kernel)
    checks.check_optimizer(optimizer)
    checks.check_optimizer_options(**rule)
    checks.check_state(state, optimizer, particles)
    if optimizer == "adam":
        rule["weight_decay"] = 0.0
    return _pick(backend).step_(
        particles, scores.to(particles.dtype), state, adaptive=optimizer != "sgd", **rule, **kernel
    )


def _reference_step_(
    particles: Tensor,
    scores: Tensor,
    state: dict[str, Tensor],
    *,
    adaptive: bool,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    **kernel: str | float,
) -> Diagnostics:
    finite = torch.isfinite(scores).all()
    if clip_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
        scores = scores * (clip_norm / (torch.linalg.vector_norm(scores) + 1e-6)).clamp(max=1.0)
    svgd = reference.direction(particles, scores, **kernel)

    step = state["step"] + 1
    decayed = particles * (1 - lr * weight_decay)
    if adaptive:
        moved, moments = _adam(decayed, -svgd.direction, state, step, lr, betas, eps)
    else:
        moved, moments = decayed + lr * svgd.direction, {}

    # Everything is computed, then kept or not on the device: a branch here would wait for it.
    particles.copy_(torch.where(finite, moved, particles))
    for name, new in (moments | {"step": step}).items():
        state[name].copy_(torch.where(finite, new, state[name]))
    skipped = state["skipped"].add_(~finite).clone()  # a copy: the state's own goes on counting
    mean = _mean_off_diagonal(svgd.kernel)
    return Diagnostics(svgd.bandwidth, svgd.damping, mean, svgd.drive_norm, svgd.repulsion_norm, skipped)


def _adam(
    particles: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The moved particles and the new moments. The order of operations is torch.optim.AdamW's."""
    beta1, beta2 = betas
    exp_avg = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
    exp_avg_sq = (state["exp_avg_sq"] * beta2).addcmul(gradient, gradient, value=1 - beta2)
    step = step.double()  # 0-d: does not promote the moments, and 1 - beta2**step keeps its digits
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = exp_avg_sq.sqrt() / correction2.sqrt() + eps
    moved = particles.addcdiv(exp_avg * -(lr / correction1), denominator)
    return moved, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    M = len(kernel)
    if M == 1:
        return torch.ones_like(kernel[0, 0])
    # zeroed, not subtracted: where particles lie far apart the entries are far below the rounding of the diagonal
    return kernel.clone().fill_diagonal_(0).sum() / (M * (M - 1))


BACKENDS = {"reference": Backend(reference.direction, _reference_step_)}


def _pick(backend: str) -> Backend:
    """`auto` is the first that can run here."""
    name = "reference" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {backend!r}")
    return BACKENDS[name]
