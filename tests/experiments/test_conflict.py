"""Appendix A's Gaussians: each way to a starting point is its closed form, and only averaging misses mu_global."""

import json

import numpy
import pytest
import torch
from scipy.optimize import minimize

from bmtpt_ds.experiments import conflict, conflict_world
from bmtpt_ds.experiments.conflict import sample_posterior, spread, train_jointly, train_separately
from bmtpt_ds.experiments.conflict_world import WIDTH, World, best_weights, make_world, mean_by_precision, source_loss
from bmtpt_ds.svgd import svgd_direction

ADAMW = {"optimizer": "adamw", "lr": 0.3, "steps": 1000}
SGD = {"optimizer": "sgd", "lr": 0.03, "steps": 1500}  # below 2 / the greatest precision of the product, 53


def global_mode(world: World) -> torch.Tensor:
    return mean_by_precision(world.modes_KD, world.precisions_KDD)


def norm(theta: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(theta))


def excess(theta_D: torch.Tensor, world: World) -> float:
    return float(source_loss(torch.stack([theta_D, global_mode(world)]), world).diff().neg())


def scalings(factors: tuple[float, ...]) -> World:
    """Contradicting tasks, whose precisions are one matrix times a factor each."""
    world = make_world(2.0)
    one_DD = world.precisions_KDD[0]
    return world._replace(precisions_KDD=torch.tensor(factors, dtype=torch.float64)[:, None, None] * one_DD)


@pytest.mark.parametrize("where", conflict.WHERE)
@pytest.mark.parametrize("distance", [0.0, 2.0])
def test_world_is_as_it_says(distance, where):
    """The fourth task's mode moves by the distance, along directions of the precision that is named."""
    still, moved = make_world(0.0, where), make_world(distance, where)
    way_KD = moved.modes_KD - still.modes_KD
    assert norm(way_KD[:-1]) == 0
    assert norm(way_KD[-1]) == pytest.approx(distance * WIDTH)
    precision = {"unsure": conflict_world.PRECISION_UNSURE, "sure": conflict_world.PRECISION_SURE}[where]
    along = float(way_KD[-1] @ moved.precisions_KDD[-1] @ way_KD[-1])
    assert along == pytest.approx(precision * (distance * WIDTH) ** 2)
    assert float(torch.linalg.inv(moved.precisions_KDD[-1]).trace()) == pytest.approx(WIDTH**2)


def test_global_mode_is_the_least_of_the_sum():
    world = make_world(2.0)
    theta_1D = global_mode(world)[None].requires_grad_()
    (gradient_1D,) = torch.autograd.grad(source_loss(theta_1D, world).sum(), theta_1D)
    assert norm(gradient_1D) < 1e-10


@pytest.mark.parametrize("options", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_prompts_alone_and_together_are_their_closed_forms(options):
    world = make_world(2.0)
    assert norm(train_separately(world, **options) - world.modes_KD) < 1e-8
    assert norm(train_jointly(world, **options) - global_mode(world)) < 1e-8


@pytest.mark.parametrize("damping", ["paper", "matched", "none"])
def test_particles_are_centred_on_the_global_mode(damping):
    """Where phi = 0 the sum of all particles' phi has no repulsion left: the mean of the particles, each weighted by
    the sum of its column of K_l, is mu_global exactly, and the plain one nearly."""
    world = make_world(2.0)
    theta_MD = sample_posterior(world, damping=damping, optimizer="sgd", lr=0.1, steps=1500)
    phi = svgd_direction(theta_MD, torch.zeros_like(theta_MD), damping=damping)
    weights_M = phi.kernel.sum(0) - 1 + phi.damping
    centre_D, goal_D = weights_M @ theta_MD / weights_M.sum(), global_mode(world)
    assert norm(centre_D - goal_D) < 2e-3
    assert norm(theta_MD.mean(0) - goal_D) < 0.03
    assert norm(world.modes_KD.mean(0) - goal_D) > 1  # what averaging is off


def test_particles_of_a_runs_optimizer_are_too():
    world = make_world(2.0)
    theta_MD = sample_posterior(world)
    assert norm(theta_MD.mean(0) - global_mode(world)) < 0.03
    assert excess(theta_MD.mean(0), world) < 1e-2


def test_all_three_agree_where_covariances_are_the_same():
    world = scalings((1.0, 1.0, 1.0, 1.0))
    averaged_D = train_separately(world, **ADAMW).mean(0)
    assert norm(averaged_D - train_jointly(world, **ADAMW)) < 1e-6
    assert norm(averaged_D - sample_posterior(world).mean(0)) < 0.03


def test_scalings_of_one_another_want_their_factors_as_weights():
    """The plain mean misses it, for which the appendix has no word; the mean weighted by the factors does not."""
    factors = (1.0, 2.0, 3.0, 4.0)
    world = scalings(factors)
    goal_D = global_mode(world)
    weights_K = best_weights(world.modes_KD, goal_D, world.precisions_KDD.sum(0))
    assert weights_K.tolist() == pytest.approx([factor / sum(factors) for factor in factors])
    assert norm(weights_K @ world.modes_KD - goal_D) < 1e-9
    assert norm(world.modes_KD.mean(0) - goal_D) > 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distance", [0.0, 4.0])
def test_no_weights_reach_the_global_mode(seed, distance):
    """Appendix A: "a weighted sum of the individual modes is unlikely to equal mu_global". Nor does any that weighs
    negatively or sums to something else, by least squares."""
    world = make_world(distance, seed=seed)
    goal_D = global_mode(world)
    weights_K = best_weights(world.modes_KD, goal_D, world.precisions_KDD.sum(0))
    assert 10 < excess(weights_K @ world.modes_KD, world) < excess(world.modes_KD.mean(0), world)
    anything_K = torch.linalg.lstsq(world.modes_KD.T, goal_D[:, None]).solution[:, 0]
    assert norm(anything_K @ world.modes_KD - goal_D) > 1


@pytest.mark.parametrize("seed", range(8))
def test_best_weights_are_those_of_a_solver(seed):
    generator = torch.Generator().manual_seed(seed)
    points_KD, goal_D, root_DD = (torch.randn(*s, generator=generator).double() for s in [(4, 6), (6,), (6, 6)])
    metric_DD = root_DD @ root_DD.T

    def distance(weights) -> float:
        apart_D = torch.as_tensor(weights) @ points_KD - goal_D
        return float(apart_D @ metric_DD @ apart_D)

    one = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    solved = minimize(distance, numpy.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=one, tol=1e-12)
    weights_K = best_weights(points_KD, goal_D, metric_DD)
    assert weights_K.min() >= 0 and float(weights_K.sum()) == pytest.approx(1)
    assert weights_K.tolist() == pytest.approx(solved.x.tolist(), abs=1e-3)


@pytest.mark.parametrize("where", conflict.WHERE)
def test_excess_grows_with_contradiction_for_averaging_alone(where):
    worlds = [make_world(distance, where) for distance in (0.0, 2.0, 4.0)]
    found = [conflict.quality(conflict.starting_points(world), world) for world in worlds]
    of_averaging = [quality["averaging"]["source_excess"] for quality in found]
    assert of_averaging[0] > 10 and of_averaging[1] > 1.5 * of_averaging[0] and of_averaging[2] > 1.5 * of_averaging[1]
    for way in ("joint", "posterior"):
        assert max(abs(quality[way]["source_excess"]) for quality in found) < 0.05


def test_averaging_by_precision_mends_it():
    world = make_world(4.0)
    prompts_KD = train_separately(world)
    assert abs(excess(mean_by_precision(prompts_KD, world.precisions_KDD), world)) < 1e-6


def test_target_follows_a_contradiction_only_where_the_fourth_is_sure():
    """Averaging gives every task the same vote; the posterior heeds who is sure, for better and for worse."""
    unsure, sure = ({n: q["target_loss"] for n, q in _exact(where).items()} for where in ("unsure", "sure"))
    assert unsure["posterior"] < unsure["averaging"] / 2
    assert sure["posterior"] > 2 * sure["averaging"]


def _exact(where):
    world = make_world(4.0, where)
    return conflict.quality(conflict.closed_forms(world), world)


def test_spread_of_exact_samples_is_the_posteriors():
    world = make_world(0.0)
    total_DD = world.precisions_KDD.sum(0)
    noise_DN = torch.randn(len(total_DD), 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = spread(torch.linalg.solve(torch.linalg.cholesky(total_DD).mT, noise_DN).T, world)
    assert found["kept"] == pytest.approx(1, rel=0.02)
    assert found["widths"] == pytest.approx(found["posterior"], rel=0.02)
    assert found["posterior"] == sorted(found["posterior"], reverse=True)


def test_few_particles_are_too_narrow_and_flat():
    """Ten particles: little of the variance, none of it in the stiffer half of the directions."""
    world = make_world(0.0)
    none, paper = (spread(sample_posterior(world, damping=d, steps=1000), world) for d in ("none", "paper"))
    assert none["kept"] < 0.15 < 0.2 < paper["kept"] < 0.4
    assert max(paper["widths"][4:]) < 0.01 < min(paper["posterior"])


def test_files_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conflict, "DISTANCES", (1.0,))
    monkeypatch.setattr(conflict, "SPREADS", (("paper", 10, 20), ("matched", 100, 3)))
    monkeypatch.setattr(conflict, "OTHER_WORLDS", range(1, 3))
    monkeypatch.setattr("sys.argv", ["conflict", "--out", str(tmp_path / "new")])
    assert conflict.main() == 0
    assert (tmp_path / "new/conflict.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "new/conflict.json").read_text())
    assert set(found["sweeps"]["sure"]) == {"1"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("unsure   1 ") and printed[-1].startswith("damping matched, M = 100: ")


def test_a_file_for_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").touch()
    monkeypatch.setattr("sys.argv", ["conflict", "--out", str(tmp_path / "taken")])
    assert conflict.main() == 2
    assert "that is a file" in capsys.readouterr().err
