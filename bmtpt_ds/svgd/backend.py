"""What a backend is given and what it gives back.

Symbols: M particles, D numbers in a particle (prompt length times hidden size).
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .reference import Direction


class Diagnostics(NamedTuple):
    """What a step was made of: 0-d tensors on the particles' device, good until the state's next step.

    Norms run over all M * D entries.
    """

    bandwidth: Tensor  # h, a squared distance; 1 where M = 1
    damping: Tensor  # lambda
    kernel_mean: Tensor  # mean of K off its diagonal; near 0 the particles ignore each other; 1 where M = 1
    drive_norm: Tensor  # norm of 1/M K_l @ score, after clipping; not finite in a skipped step
    repulsion_norm: Tensor  # norm of the repulsion's part of phi
    skipped: Tensor  # int64, steps skipped so far because a score was not finite


class State(dict[str, Tensor]):
    """The tensors of a sampler, by name; beside them what a backend keeps from one step to the next.

    `workspace` is nobody's to read: buffers whose content counts for nothing once a step is over.
    """

    workspace: Any = None


class KernelOptions(NamedTuple):
    """How the direction is made; svgd_direction explains them."""

    bandwidth: str | float
    damping: str | float
    repulsion_scale: float


class Update(NamedTuple):
    """What scores are taken for and how an optimizer goes along the direction; svgd_step_ explains it."""

    adaptive: bool  # adamw, else sgd
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None
    score_scale: float = 1.0


class Backend(Protocol):
    """One way to compute the two public functions. Arguments come checked."""

    def direction(self, particles: Tensor, scores: Tensor, options: KernelOptions) -> Direction: ...

    def step_(
        self, particles: Tensor, scores: Tensor, state: dict[str, Tensor], options: KernelOptions, update: Update
    ) -> Diagnostics: ...

    def describe(self, particles: Tensor) -> str:
        """In a few words for the log of a run."""
        ...
