"""Source tasks whose posteriors are Gaussians, one of which contradicts the others; what is best for them, exactly.

Task k's posterior is N(mu_k, Lambda_k^-1), so its loss is 1/2 (theta - mu_k)^T Lambda_k (theta - mu_k), in nats. The
product of all is N(mu_global, (sum Lambda_k)^-1) with mu_global = (sum Lambda_k)^-1 sum Lambda_k mu_k. Source:
appendix A of the BMTPT paper. Symbols: K tasks, L prompt length, H hidden size, D = L * H, M prompts.
"""

from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

K, L, H = 4, 4, 16
D = L * H
SURE = 16  # directions, of D, about which a task is sure
PRECISION_SURE, PRECISION_UNSURE = 20.0, 1.0  # inverse squares of a prompt's entries: widths of 0.22 and 1
WIDTH = (SURE / PRECISION_SURE + (D - SURE) / PRECISION_UNSURE) ** 0.5  # root of a posterior's trace: 7.0


class World(NamedTuple):
    """Source tasks 0 to K - 1, the last of which contradicts; float64."""

    modes_KD: Tensor  # mu_k
    precisions_KDD: Tensor  # Lambda_k
    target_mode_D: Tensor  # what the agreeing tasks share
    target_precision_DD: Tensor


def make_world(distance: float, where: str = "unsure", seed: int = 0) -> World:
    """Tasks that are each sure about a random subspace of their own.

    A mode lies off what the tasks share as chance has it, N(0, Lambda_k^-1). The last is moved farther by `distance`
    WIDTHs within the directions that `where` names. Worlds of one seed differ in nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    sure_KDU = torch.linalg.qr(normal(K + 1, D, SURE)).Q  # the target's too
    projections_KDD = sure_KDU @ sure_KDU.mT
    precisions_KDD = PRECISION_UNSURE * torch.eye(D) + (PRECISION_SURE - PRECISION_UNSURE) * projections_KDD
    shared_D = normal(D)
    chance_KD = torch.linalg.solve(torch.linalg.cholesky(precisions_KDD[:K]).mT, normal(K, D, 1)).squeeze(2)
    modes_KD = shared_D + chance_KD
    within_DD = projections_KDD[K - 1]
    within_DD = within_DD if where == "sure" else torch.eye(D) - within_DD
    way_D = within_DD @ normal(D)
    modes_KD[-1] += distance * WIDTH * way_D / torch.linalg.vector_norm(way_D)
    return World(modes_KD, precisions_KDD[:K], shared_D, precisions_KDD[K])


def losses(theta_MD: Tensor, modes_KD: Tensor, precisions_KDD: Tensor) -> Tensor:
    """Of every prompt on every task, [K, M] in nats."""
    apart_KMD = theta_MD - modes_KD[:, None]
    return (apart_KMD @ precisions_KDD * apart_KMD).sum(2) / 2


def source_loss(theta_MD: Tensor, world: World) -> Tensor:
    """Sum over the source tasks, [M]."""
    return losses(theta_MD, world.modes_KD, world.precisions_KDD).sum(0)


def target_loss(theta_MD: Tensor, world: World) -> Tensor:
    """[M]; 0 at what the agreeing tasks share."""
    return losses(theta_MD, world.target_mode_D[None], world.target_precision_DD[None])[0]


def mean_by_precision(modes_KD: Tensor, precisions_KDD: Tensor) -> Tensor:
    """mu_global [D] of appendix A; it needs a matrix [D, D] of each task, which no prompt of a real size has."""
    pulls_D = (precisions_KDD @ modes_KD[:, :, None]).sum(0).squeeze(1)
    return torch.linalg.solve(precisions_KDD.sum(0), pulls_D)


def best_weights(points_KD: Tensor, goal_D: Tensor, metric_DD: Tensor) -> Tensor:
    """Weights [K], 0 or more and of sum 1, whose mean of the points comes nearest to the goal in the metric.

    Exact: among the points that count it is least squares under one equation; K is small, every set of them is tried.
    """
    apart_KD = points_KD - goal_D
    gram_KK = apart_KD @ metric_DD @ apart_KD.T
    gram_KK = gram_KK / gram_KK.diagonal().mean()
    best, least = torch.zeros_like(gram_KK[0]), float("inf")
    for size in range(1, len(gram_KK) + 1):
        for chosen in map(list, combinations(range(len(gram_KK)), size)):
            weights = _weights_of_sum_one(gram_KK[chosen][:, chosen])
            candidate = torch.zeros_like(best).index_put((torch.tensor(chosen),), weights)
            value = float(candidate @ gram_KK @ candidate)
            if weights.min() >= 0 and value < least:
                best, least = candidate, value
    return best


def _weights_of_sum_one(gram_KK: Tensor) -> Tensor:
    """Weights w [K] of sum 1, any sign, with the least w^T gram w; a goal that is reached makes the gram singular."""
    bordered = torch.nn.functional.pad(gram_KK, (0, 1, 0, 1), value=1.0)
    bordered[-1, -1] = 0
    sums = torch.zeros_like(bordered[0])
    sums[-1] = 1
    return torch.linalg.solve(bordered, sums)[:-1]
