"""The closed forms of damped_gaussian.py against its solver, and the solver against the project's own steps."""

import math

import pytest
import torch

from bmtpt_ds.svgd import init_state, svgd_direction, svgd_step_
from tests.svgd.damped_gaussian import EMPTY, rest_ratios, settle


def draws(v_D, M, shift=3.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(M, len(v_D), generator=generator, dtype=torch.float64) + shift) * v_D.sqrt()


def two_widths(D, wider):
    v_D = torch.ones(D, dtype=torch.float64)
    v_D[D // 2 :] = wider**2
    return v_D


@pytest.mark.parametrize("wider", [1.0, 2.0])
@pytest.mark.parametrize(
    ("bandwidth", "damping"),
    [
        ("median_log", "none"),
        ("median_log", "paper"),
        ("median_log", "matched"),
        ("median", "paper"),
        ("printed", "none"),
    ],
)
def test_a_simplex_holds_what_the_closed_form_says(bandwidth, damping, wider):
    M, v_D = 5, two_widths(20, wider)
    rest = settle(draws(v_D, M), v_D, bandwidth, damping, tolerance=1e-6)
    assert rest.settled
    ratio_D, widest_D = rest.particles_MD.var(0) / v_D, v_D == v_D.max()
    expected_D = rest_ratios(v_D, M, bandwidth, damping)
    assert ratio_D[~widest_D].sum() < 1e-4
    assert ratio_D[widest_D].mean().item() == pytest.approx(expected_D[-1].item(), rel=1e-4)
    assert rest.particles_MD.mean(0).abs().max() < 1e-4


def test_the_solver_ends_where_plain_steps_end():
    M, v_D = 4, two_widths(12, 2.0)
    particles_MD = draws(v_D, M)
    rest = settle(particles_MD, v_D, "median_log", "matched", tolerance=1e-6)
    state = init_state(particles_MD, "sgd")
    for _ in range(3000):
        svgd_step_(particles_MD, -particles_MD / v_D, state, optimizer="sgd", lr=0.5, damping="matched")
    plain_D, solved_D = particles_MD.var(0) / v_D, rest.particles_MD.var(0) / v_D
    assert plain_D[:6].max() < 1e-4 and solved_D[:6].max() < 1e-4
    assert plain_D[6:].mean().item() == pytest.approx(2.0, abs=1e-3)
    assert solved_D[6:].mean().item() == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("damping", ["none", "paper", "matched"])
def test_no_more_widths_are_held_than_particles_less_one(damping):
    """All widths differ, so no simplex fits: the eigenvalues of the pencil still bound what is held."""
    M, v_D = 4, torch.logspace(0, 1, 12, dtype=torch.float64)
    rest = settle(draws(v_D, M), v_D, "median_log", damping, tolerance=1e-3)
    assert rest.settled
    ratio_D = rest.particles_MD.var(0) / v_D
    assert (ratio_D > EMPTY * ratio_D.max()).sum() <= M - 1
    kernel = svgd_direction(rest.particles_MD, -rest.particles_MD / v_D, damping=damping)
    weights_M = kernel.kernel.sum(0) - 1 + kernel.damping
    assert (weights_M @ rest.particles_MD / v_D.sqrt()).abs().max() < 1e-2


def test_too_little_of_the_own_score_drives_the_particles_apart():
    """The paper's constant with its printed bandwidth: K is about 1 off the diagonal, lambda 0.4 on it."""
    v_D = two_widths(20, 1.0)
    assert math.isinf(rest_ratios(v_D, 5, "printed", "paper").max())
    rest = settle(draws(v_D, 5), v_D, "printed", "paper")
    assert rest.apart and not rest.settled
