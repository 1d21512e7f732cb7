"""The damped SVGD direction in plain torch: the truth that every other backend is tested against.

Symbols, also as suffixes of tensor names: M particles, D numbers in a particle (prompt length times hidden size).

    r2_ij = ||theta_i - theta_j||^2
    h     = median of r2_ij over pairs i < j, / log(M + 1)        (bandwidth "median_log"; the others below)
    K_ij  = exp(-r2_ij / h)
    K_l   = K with lambda on its diagonal                         (damping)
    phi_i = 1/M sum_j K_l,ij score_j  +  1/M repulsion_scale sum_j 2/h K_ij (theta_i - theta_j)
            ------------ drive ------    ------------------ repulsion ---------------------------

Source: Appendix B of the BMTPT paper (RBF kernel B.3, damped SVGD B.4). `theta` moves along +phi.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

H_FLOOR = 1e-12  # coincident particles: r2 = 0, so K = 1 and no repulsion, instead of 0 / 0


class Direction(NamedTuple):
    """phi and what it was made of, all on the particles' device. Norms run over all M * D entries."""

    direction: Tensor  # [M, D] phi
    kernel: Tensor  # [M, M] K, its diagonal 1: without lambda
    bandwidth: Tensor  # [] h, a squared distance
    damping: Tensor  # [] lambda
    drive_norm: Tensor  # []
    repulsion_norm: Tensor  # [], repulsion_scale included


def direction(
    theta_MD: Tensor, score_MD: Tensor, bandwidth: str | float, damping: str | float, repulsion_scale: float
) -> Direction:
    """phi at `theta` [M, D] given `score` [M, D] = grad log p(theta_i), both of one floating dtype and device."""
    M, D = theta_MD.shape
    # A loop over particles: a Gram product cancels when particles lie close together far from the origin, an
    # [M, M, D] temporary does not fit, and without a matmul neither TF32 nor autocast can lower the precision.
    r2_MM = torch.stack([(theta_D - theta_MD).square().sum(dim=1) for theta_D in theta_MD])
    h, lam = bandwidth_and_damping(r2_MM, D, bandwidth, damping)
    K_MM = torch.exp(-r2_MM / h)
    K_l_MM = K_MM.clone()
    K_l_MM.diagonal().copy_(lam)  # set: subtracting 1 - lambda cancels when lambda is tiny

    drive_MD = torch.stack([(K_M[:, None] * score_MD).sum(dim=0) for K_M in K_l_MM]) / M
    # diag(K 1) theta - K theta, as differences for the sake of the last digits
    apart_MD = torch.stack(
        [(K_M[:, None] * (theta_D - theta_MD)).sum(dim=0) for K_M, theta_D in zip(K_MM, theta_MD, strict=True)]
    )
    repulsion_MD = repulsion_scale * 2 / h * apart_MD / M
    norms = torch.linalg.vector_norm(drive_MD), torch.linalg.vector_norm(repulsion_MD)
    return Direction(drive_MD + repulsion_MD, K_MM, h, lam, *norms)


def bandwidth_and_damping(r2_MM: Tensor, D: int, bandwidth: str | float, damping: str | float) -> tuple[Tensor, Tensor]:
    """h and lambda, 0-d. `median` is Ba et al.'s heuristic, `printed` the paper's B.3 to the letter."""
    M, one = len(r2_MM), r2_MM.new_ones(())
    if M == 1:
        return one, one  # no pairs; phi is the score
    i, j = torch.triu_indices(M, M, offset=1, device=r2_MM.device)
    pairs, n = r2_MM[i, j].sort().values, M * (M - 1) // 2
    median = (pairs[(n - 1) // 2] + pairs[n // 2]) / 2  # both are the middle one where n is odd

    by_name = {"median_log": median / math.log(M + 1), "median": median, "printed": median**2 / math.log(M + 1)}
    h = (by_name[bandwidth] if isinstance(bandwidth, str) else one * bandwidth).clamp(min=H_FLOOR)
    c = median / h
    # `paper` is the lambda_min of B.4; `matched` is the same argument for any c (paper's: c = 1), not clipped
    by_name = {
        "paper": one * min(1.0, math.exp(-1) * (1 + M / D)),
        "matched": torch.exp(-c) * (1 + c * M / D),
        "none": one,
    }
    return h, by_name[damping] if isinstance(damping, str) else one * damping
