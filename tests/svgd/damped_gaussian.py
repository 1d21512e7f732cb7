"""Where damped SVGD comes to rest on N(0, Sigma), Sigma diagonal: the closed form, and a solver that finds it.

Symbols: M particles, D directions, v_d = sigma_d^2 the true variance of direction d, s_d the particles' (unbiased),
ratio_d = s_d / v_d, T = sum of s_d; K, K_l, lambda, h, r2 as in bmtpt_ds/svgd/reference.py; L = diag(K 1) - K.

The score is -theta / v, so direction d, a column of M numbers, moves by

    d theta_d / dt = 1/M [ 2/h L - K_l / v_d ] theta_d.                                                         (1)

At rest theta_d is 0 or an eigenvector of the pencil (2/h L, K_l) with the eigenvalue 1/v_d. L has the null vector 1, so
at most M - 1 such eigenvalues are not 0 (if the pencil is regular): at most M - 1 different widths are held at all,
whatever kernel, bandwidth and lambda are. And L 1 = 0 gives 1^T K_l theta_d = 0: the mean, weighted by K_l's row
sums, is exact.

If all pairs are equally far apart (a simplex; M - 1 of the widest directions must be equally wide to hold it):
K = k = e^-c off the diagonal, c = r2 / h, r2 = 2 T, so h = 2 T / c, and of the centred theta_d (1) leaves

    d log s_d / dt = 2/M [ k c M / T - (lambda - k) / v_d ].                                                    (2)

The repulsion is the same in all directions, the drive is not: for lambda > k only those of the largest v are at rest,
every other shrinks to nothing at the rate 2/M (lambda - k) (1/v_d - 1/v_max). The W widest hold

    sum over d of ratio_d = M c / (lambda e^c - 1),   spread over W directions;                                 (3)

Sigma is in it through c alone, by `median_log` and `median` not at all; lambda is in the sum, and not in where it goes.
lambda = e^-c (1 + c M/D), `matched`, makes the sum D. For lambda <= k the particles fly apart.
The argument for the isotropic case is Ba et al.'s (Understanding the Variance Collapse of SVGD in High Dimensions).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bmtpt_ds.svgd import svgd_direction
from bmtpt_ds.svgd.reference import bandwidth_and_damping

TOLERANCE = 1e-4  # of the residual
MOVED = 1e-2  # of the largest of four quarters' ratios: the most that one may move while the steps double
EMPTY = 0.01  # of the largest ratio: a direction with less is asked whether it would grow


class Rest(NamedTuple):
    """Particles after a solve, and how it ended: settled, apart (the variance grows without bound) or neither."""

    particles_MD: Tensor
    steps: int
    residual: float  # ||sigma phi|| / ||sigma drive||, both of svgd_direction
    moved: float  # see MOVED
    growth: float  # largest rate of an empty direction in (1), in units of |lambda - k| / v_d; nan: none is empty
    settled: bool
    apart: bool


def ratio_sum(M: int, lam: float, c: float) -> float:
    """(3): sum over the directions of the particles' variance over the true one; inf where they fly apart."""
    left = lam * math.exp(c) - 1
    return M * c / left if left > 0 else math.inf


def rest_ratios(v_D: Tensor, M: int, bandwidth: str, damping: str | float) -> Tensor:
    """ratio_d [D] on a simplex, by (3): exact if M - 1 directions or more share the largest variance."""
    D, widest = len(v_D), v_D.max().item()
    pairs_MM = 1 - torch.eye(M, dtype=torch.float64)
    r2 = 2 * D * widest
    for _ in range(10_000):  # only `printed` has a c that depends on r2, and needs more than a second turn
        h, lam = bandwidth_and_damping(r2 * pairs_MM, D, bandwidth, damping)
        total = ratio_sum(M, lam.item(), r2 / h.item())
        last, r2 = r2, 2 * widest * total
        if math.isinf(r2) or abs(r2 - last) <= 1e-13 * r2:
            break
    widest_D = v_D == widest
    return torch.where(widest_D, total / widest_D.sum(), 0.0)


def settle(
    start_MD: Tensor,
    v_D: Tensor,
    bandwidth: str,
    damping: str | float,
    *,
    tolerance: float = TOLERANCE,
    pace: float = 0.5,
    most_steps: int = 8192,
) -> Rest:
    """Particles [M, D] float64 at rest, by semi-implicit Euler on (1) with direction d's time in units of M v_d.

    Time's unit changes no point of rest, nor whether an empty direction stays empty. The drive is implicit, so that the
    stiffest direction does not set the step; the repulsion, which is not linear, is explicit, and `pace` is what the
    particles' distances bear: 0.5 of a simplex, less where near neighbours push hard, 0.02 for M > D. Looked at
    whenever the steps have doubled. D is a multiple of 4.
    """
    theta_MD, last_4, done = start_MD, torch.zeros(4, dtype=torch.float64), 0
    for mark in (2**n for n in range(5, most_steps.bit_length())):
        while done < mark:
            theta_MD, done = _step(theta_MD, v_D, bandwidth, damping, pace), done + 1
        ratio_D = theta_MD.var(0) / v_D
        if not (ratio_D < 1e8).all():  # the particles', if the drive of centred ones points outward; else the solver's
            apart = (_kernels(theta_MD, bandwidth, damping)[3] < 0).item()
            return Rest(theta_MD, done, math.inf, math.inf, math.nan, settled=False, apart=apart)
        residual = _residual(theta_MD, v_D, bandwidth, damping)
        now_4 = ratio_D.view(4, -1).mean(1)
        moved, last_4 = ((now_4 - last_4).abs().max() / now_4.max()).item(), now_4
        growth = _growth_of_empty(theta_MD, v_D, bandwidth, damping)
        settled = residual <= tolerance and moved <= MOVED and not growth > 1e-3
        if settled:
            break
    return Rest(theta_MD, done, residual, moved, growth, settled, apart=False)


def _step(theta_MD: Tensor, v_D: Tensor, bandwidth: str, damping: str | float, pace: float) -> Tensor:
    K_MM, K_l_MM, h, gap = _kernels(theta_MD, bandwidth, damping)
    M = len(K_MM)
    k = (K_MM.sum() - M) / (M * (M - 1))
    length = pace / torch.maximum(gap.abs(), -k * torch.log(k))  # rates of the spread and of the simplex's shape
    away_MD = K_MM.sum(1, keepdim=True) * theta_MD - K_MM @ theta_MD
    identity_MM = torch.eye(M, dtype=theta_MD.dtype)
    return torch.linalg.solve_ex(identity_MM + length * K_l_MM, theta_MD + length * 2 / h * v_D * away_MD).result


def _kernels(theta_MD: Tensor, bandwidth: str, damping: str | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, K_l, h, and lambda less the mean of K off the diagonal."""
    centred_MD = theta_MD - theta_MD.mean(0)
    gram_MM = centred_MD @ centred_MD.T  # float64 and centred: nothing to speak of cancels
    norms_M = gram_MM.diagonal()
    r2_MM = (norms_M[:, None] + norms_M - 2 * gram_MM).clamp(min=0).fill_diagonal_(0)
    h, lam = bandwidth_and_damping(r2_MM, theta_MD.shape[1], bandwidth, damping)
    K_MM = torch.exp(-r2_MM / h)
    K_l_MM = K_MM.clone()
    K_l_MM.diagonal().copy_(lam)
    M = len(K_MM)
    return K_MM, K_l_MM, h, lam - (K_MM.sum() - M) / (M * (M - 1))


def _residual(theta_MD: Tensor, v_D: Tensor, bandwidth: str, damping: str | float) -> float:
    options = {"bandwidth": bandwidth, "damping": damping, "backend": "reference"}
    phi_MD, drive_MD = (
        svgd_direction(theta_MD, -theta_MD / v_D, repulsion_scale=scale, **options).direction for scale in (1.0, 0.0)
    )
    return ((v_D.sqrt() * phi_MD).norm() / (v_D.sqrt() * drive_MD).norm()).item()


def _growth_of_empty(theta_MD: Tensor, v_D: Tensor, bandwidth: str, damping: str | float) -> float:
    """Largest eigenvalue of v_d 2/h L - K_l for the widest empty direction, over |lambda - k|."""
    ratio_D = theta_MD.var(0) / v_D
    empty_D = ratio_D < EMPTY * ratio_D.max()
    if not empty_D.any():
        return math.nan
    K_MM, K_l_MM, h, gap = _kernels(theta_MD, bandwidth, damping)
    L_MM = torch.diag(K_MM.sum(1)) - K_MM
    return (torch.linalg.eigvalsh(v_D[empty_D].max() * 2 / h * L_MM - K_l_MM)[-1] / gap.abs()).item()
