"""A sampler is a pure direction and a step over a named state: svgd_direction, init_state, svgd_step_.

Symbols: M particles, D numbers in a particle (prompt length times hidden size). No function here reads a value back
from the device, so the host runs ahead of it; what a caller may want to know comes back as tensors.
"""

import torch
from torch import Tensor

from . import checks, fused
from .backend import Backend, Diagnostics, KernelOptions, State, Update
from .eager import Eager
from .fused import Fused
from .reference import Direction

BACKENDS: dict[str, Backend] = {"reference": Eager(), "triton": Fused()}


@torch.no_grad()
def svgd_direction(
    particles: Tensor,
    scores: Tensor,
    *,
    bandwidth: str | float = "median_log",
    damping: str | float = "paper",
    repulsion_scale: float = 1.0,
    backend: str | Backend = "auto",
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
        backend: `triton` (kernels for an NVIDIA GPU: float32 particles, 32 at most), `reference` (torch, anywhere),
            `auto` (triton where it can run, else reference), or a Backend.

    Returns:
        Direction: `.direction` [M, D], along which to move the particles; `.kernel` [M, M], K with ones on its diagonal
        (lambda is not in it); 0-d `.bandwidth`, `.damping`, `.drive_norm`, `.repulsion_norm`.

    Raises:
        ValueError: a wrong shape, dtype, device or option, by name; or a backend that cannot run here.
    """
    options = KernelOptions(bandwidth, damping, repulsion_scale)
    checks.check_particles(particles)
    checks.check_scores(scores, particles)
    checks.check_kernel_options(*options)
    return choose_backend(particles, backend).direction(particles, scores, options)


def init_state(particles: Tensor, optimizer: str) -> State:
    """The state of a fresh run, beside the particles [M, D]: a dict of tensors, fit for safetensors.

    To go on from a saved one, copy its tensors into those of a fresh one: the kernels keep their buffers beside it. A
    plain dict of the same tensors does too, but each step then makes its buffers anew.

    `step` and `skipped` (0-d int64: steps taken, steps skipped); for `adamw` and `adam` also the moments `exp_avg` and
    `exp_avg_sq` [M, D] in the particles' dtype. Raises ValueError on an unknown optimizer or ill-shaped particles.
    """
    checks.check_particles(particles)
    checks.check_optimizer(optimizer)
    moments = {name: torch.zeros_like(particles, requires_grad=False) for name in checks.MOMENTS[optimizer]}
    counters = {name: torch.zeros((), dtype=torch.int64, device=particles.device) for name in ("step", "skipped")}
    return State(moments | counters)


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
    score_scale: float = 1.0,
    bandwidth: str | float = "median_log",
    damping: str | float = "paper",
    repulsion_scale: float = 1.0,
    backend: str | Backend = "auto",
) -> Diagnostics:
    """Moves the particles one step along phi, in place (Algorithm 1 of the paper, upper half).

    Scores with an inf or a nan anywhere skip the step: particles and state keep every bit, but for `skipped`, which
    goes up by one. The host does not wait to find out.

    Args:
        particles: [M, D] float32 or float64, changed in place.
        scores: [M, D] any floating dtype, grad log p(particle) once multiplied by `score_scale`. Not changed.
        state: of init_state for this optimizer, changed in place.
        optimizer: `adamw` (torch.optim.AdamW fed with the gradient -phi), `adam` (adamw with weight decay 0, whatever
            `weight_decay` says) or `sgd` (particles += lr * phi).
        lr: learning rate of this step, a number or a 0-d tensor.
        betas, eps: of adamw and adam.
        weight_decay: decoupled, for adamw and sgd: particles *= 1 - lr * weight_decay before the move.
        clip_norm: scales the scores down to this joint norm over all particles, before phi; None does not clip.
        score_scale: what the given scores are multiplied by before all else, in the same launch: -1 where they are the
            gradients of a loss.
        bandwidth, damping, repulsion_scale, backend: as for svgd_direction.

    Returns:
        Diagnostics, 0-d tensors on the device.

    Raises:
        ValueError: a wrong shape, dtype, device or option, by name; nothing has changed then.
    """
    options = KernelOptions(bandwidth, damping, repulsion_scale)
    checks.check_particles(particles)
    checks.check_scores(scores, particles)
    checks.check_kernel_options(*options)
    checks.check_optimizer(optimizer)
    checks.check_optimizer_options(lr, betas, eps, weight_decay, clip_norm, score_scale)
    checks.check_state(state, optimizer, particles)
    decay = 0.0 if optimizer == "adam" else weight_decay
    update = Update(optimizer != "sgd", lr, tuple(betas), eps, decay, clip_norm, score_scale)
    return choose_backend(particles, backend).step_(particles, scores, state, options, update)


def choose_backend(particles: Tensor, backend: str | Backend = "auto") -> Backend:
    """What would compute a step of these particles [M, D]; its `describe` says so to a person.

    Raises:
        ValueError: there is no such backend, or it cannot run here; it says why.
    """
    if not isinstance(backend, str):
        return backend
    if backend == "auto":
        # on a CPU the kernels run in Triton's interpreter, which is for tests
        backend = "reference" if particles.device.type == "cpu" or fused.why_not(particles) else "triton"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "triton" and (reason := fused.why_not(particles)):
        raise ValueError(f"backend triton cannot run here: {reason}; use auto or reference")
    return BACKENDS[backend]
