"""The posterior of the source tasks as prior of the target prompts (section 4.1)."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Prior:
    """p(theta_T | D^S), the posterior of the source tasks as prior of the target prompt (section 4.1)."""

    kind: str  # `gaussian`, `mixture` or `none`
    particles: torch.Tensor  # [M, L, H] float32, or of each run its own, [R, M, L, H]
    sigma: float  # standard deviation of p(theta_T | theta_i), in units of embeddings

    @cached_property  # asked for at every step
    def centre(self) -> torch.Tensor:
        """theta_bar [L, H], or [R, L, H]."""
        return self.particles.mean(dim=-3)

    def negative_log(self, theta: torch.Tensor) -> torch.Tensor:
        """- log p(theta_T | D^S) up to a constant, [N] of prompts [N, L, H], [R, N] of [R, N, L, H].

        `gaussian` is the bound of Eq. 5 and 6, `mixture` the exact sum of Eq. 4; both are zero at a lone particle.
        """
        if self.kind == "none":
            return theta.new_zeros(theta.shape[:-2])
        if self.kind == "gaussian":
            return (theta - self.centre.unsqueeze(-3)).square().sum(dim=(-2, -1)) / (2 * self.sigma**2)
        apart = theta.unsqueeze(-3) - self.particles.unsqueeze(-4)  # [..., N, M, L, H]
        distances = apart.square().sum(dim=(-2, -1))
        return math.log(apart.shape[-3]) - torch.logsumexp(-distances / (2 * self.sigma**2), dim=-1)

    def gradient(self, theta: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of its rows' priors of each run, [R], and its gradient with respect to the prompts [R, N, L, H].

        Args:
            theta: the prompts.
            share: [R, N], of the batch's rows those of each task.
        """
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            loss = (share * self.negative_log(theta)).sum(dim=1)
            (gradient,) = torch.autograd.grad(loss.sum(), theta)
        return loss.detach(), gradient
