"""What the particles become after many steps: variances, means, and where that ends."""

import pytest
import torch

from bmtpt_ds.svgd import init_state, svgd_step_

M = 10


def sample(score, D, *, lr=0.5, steps, seed=0, **options):
    """Particles [M, D] from N(0, I) after `steps` of plain SVGD."""
    particles = torch.randn(M, D, generator=torch.Generator().manual_seed(seed))
    state = init_state(particles, "sgd")
    for _ in range(steps):
        svgd_step_(particles, score(particles), state, optimizer="sgd", lr=lr, **options)
    return particles


@pytest.mark.parametrize(
    ("damping", "bandwidth", "variance", "tolerance"),
    [
        ("matched", "median_log", 1.0, 0.01),
        ("none", "median_log", 0.024, 0.001),
        ("paper", "median_log", 0.069, 0.001),
        ("paper", "median", 1.0, 0.01),
    ],
)
def test_variance_of_a_standard_normal(damping, bandwidth, variance, tolerance):
    """Mean over dimensions of the unbiased variance of N(0, I), D = 100; M = 10 particles."""
    particles = sample(lambda theta: -theta, 100, steps=2000, damping=damping, bandwidth=bandwidth)
    assert particles.var(dim=0).mean().item() == pytest.approx(variance, abs=tolerance)


def test_without_repulsion_the_particles_collapse():
    particles = sample(lambda theta: -theta, 100, steps=2000, repulsion_scale=0.0)
    assert particles.var(dim=0).mean().item() < 1e-6


@pytest.mark.slow
def test_matched_keeps_the_trace_but_not_each_variance():
    """Half the dimensions 1.2 times wider: the stiff half collapses, the wide one doubles. README claims no more."""
    variance = torch.ones(100)
    variance[50:] = 1.2**2
    particles = sample(lambda theta: -theta / variance, 100, steps=20_000, damping="matched")
    ratio = particles.var(dim=0) / variance
    assert ratio[:50].mean().item() == pytest.approx(0.0, abs=0.01)
    assert ratio[50:].mean().item() == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("damping", ["paper", "matched", "none"])
@pytest.mark.parametrize("seed", [0, 1])
def test_mean_is_the_product_of_the_tasks_gaussians(seed, damping):
    """Appendix A: K tasks N(mu_k, inverse of Lambda_k) merge at (sum Lambda_k)^-1 sum Lambda_k mu_k, which averaging
    the tasks' own modes misses."""
    K, D = 3, 20
    generator = torch.Generator().manual_seed(seed)
    rotations = [torch.linalg.qr(torch.randn(D, D, generator=generator)).Q for _ in range(K)]
    precisions = [(q * (0.5 + 1.5 * torch.rand(D, generator=generator))) @ q.T for q in rotations]
    modes = [3 * torch.randn(D, generator=generator) for _ in range(K)]
    weighted = sum(precision @ mode for precision, mode in zip(precisions, modes, strict=True))
    merged, average = torch.linalg.solve(sum(precisions), weighted), sum(modes) / K

    def score(theta):
        return -sum((theta - mode) @ precision for precision, mode in zip(precisions, modes, strict=True))

    particles = sample(score, D, lr=0.3, steps=400, damping=damping)
    apart = (average - merged).norm()
    assert apart > 1  # otherwise there is nothing to tell apart
    assert (particles.mean(dim=0) - merged).norm() < 0.02 * apart
