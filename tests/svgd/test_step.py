"""svgd_step_: torch's own optimizers fed with -phi, steps that must not happen, and arguments that must not pass."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bmtpt_ds.svgd import init_state, svgd_direction, svgd_step_

M, D = 5, 60
OPTIMIZERS = ["adamw", "adam", "sgd"]


def draw(seed=0, dtype=torch.float32, M=M, D=D):
    return torch.randn(M, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def score_at(theta, t):
    """Of a Gaussian away from the origin, with noise of step t as sampled rows give."""
    return (2.0 - theta) * 3.0 + draw(1000 + t).to(theta.dtype)


def compare_with_torch(theirs, ours, state, steps=100, lr=lambda t: 0.05, **options):
    """Both walk on their own from the same start; `theirs` is torch's optimizer over a parameter."""
    parameter = theirs.param_groups[0]["params"][0]
    for t in range(steps):
        theirs.param_groups[0]["lr"] = lr(t)
        parameter.grad = -svgd_direction(parameter.detach(), score_at(parameter.detach(), t)).direction
        theirs.step()
        svgd_step_(ours, score_at(ours, t), state, lr=lr(t), **options)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-6)
    assert state["step"] == steps
    assert state["skipped"] == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "changing"])
def test_adamw_is_torchs(weight_decay, schedule):
    lr = {"constant": lambda t: 0.05, "changing": lambda t: 0.1 * (1 - t / 100) * min(1, (t + 1) / 10)}[schedule]
    start, options = draw(), {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    parameter = torch.nn.Parameter(start.clone())
    ours, state = start.clone(), init_state(start, "adamw")
    theirs = torch.optim.AdamW([parameter], foreach=False, **options)
    compare_with_torch(theirs, ours, state, lr=lr, optimizer="adamw", **options)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], theirs.state[parameter][name], rtol=1e-5, atol=1e-6)
    assert (ours - start).abs().mean() > 0.5  # it went somewhere


def test_adamws_defaults_are_torchs_but_for_weight_decay():
    start = draw()
    parameter, ours = torch.nn.Parameter(start.clone()), start.clone()
    theirs = torch.optim.AdamW([parameter], foreach=False, weight_decay=0.0)
    compare_with_torch(theirs, ours, init_state(start, "adamw"))


def test_adam_is_adamw_with_weight_decay_0():
    start = draw()
    decayed, adam, adamw = start.clone(), start.clone(), start.clone()
    for theta, optimizer, options in (
        (decayed, "adamw", {"weight_decay": 0.1}),
        (adam, "adam", {"weight_decay": 0.1}),
        (adamw, "adamw", {}),
    ):
        state = init_state(theta, optimizer)
        for t in range(5):
            svgd_step_(theta, score_at(theta, t), state, optimizer=optimizer, lr=0.1, **options)
    assert torch.equal(adam, adamw)
    assert not torch.equal(decayed, adamw)


def test_sgd_adds_lr_phi():
    start = draw()
    theirs = torch.optim.SGD([torch.nn.Parameter(start.clone())], lr=1.0, foreach=False)
    compare_with_torch(theirs, start.clone(), init_state(start, "sgd"), lr=lambda t: 0.3 / (t + 1), optimizer="sgd")


def test_sgd_decays_weights_apart_from_the_move():
    theta, score = draw(), draw(1)
    phi = svgd_direction(theta, score).direction
    moved = theta.clone()
    svgd_step_(moved, score, init_state(theta, "sgd"), optimizer="sgd", lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(moved, theta * 0.95 + 0.5 * phi)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float64_particles_stay_float64(optimizer):
    theta = draw(dtype=torch.float64)
    state, start = init_state(theta, optimizer), theta.clone()
    svgd_step_(theta, score_at(theta, 0), state, optimizer=optimizer, lr=0.1)
    assert theta.dtype == torch.float64
    phi = svgd_direction(start, score_at(start, 0)).direction
    expected = start + 0.1 * (phi if optimizer == "sgd" else phi / (phi.abs() + 1e-8))  # Adam's first step is a sign
    torch.testing.assert_close(theta, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_may_be_a_tensor(optimizer, dtype):
    results = []
    for lr in (0.25, torch.tensor(0.25, dtype=dtype)):  # 0.25: the same number in both types
        theta = draw()
        state = init_state(theta, optimizer)
        for t in range(3):
            svgd_step_(theta, score_at(theta, t), state, optimizer=optimizer, lr=lr, weight_decay=0.5)
        results.append(theta)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernel_options_reach_the_direction(optimizer):
    options = {"bandwidth": "median", "damping": 0.2, "repulsion_scale": 4.0, "backend": "reference"}
    theta, score = draw(), draw(1)
    found = svgd_direction(theta, score, **options)
    diagnostics = svgd_step_(theta, score, init_state(theta, optimizer), optimizer=optimizer, lr=0.1, **options)
    assert diagnostics.bandwidth == found.bandwidth
    assert diagnostics.damping == pytest.approx(0.2)
    assert diagnostics.drive_norm == found.drive_norm
    assert diagnostics.repulsion_norm == found.repulsion_norm
    if optimizer == "sgd":
        torch.testing.assert_close(theta, draw() + 0.1 * found.direction)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_scores_are_scores_scaled_before(dtype, clip_norm):
    given, ends = draw(1, dtype), []
    for scores, options in ((given, {"score_scale": -3.7}), (given.float() * -3.7, {})):
        theta, kept = draw(), scores.clone()
        state = init_state(theta, "adamw")
        for _ in range(3):
            diagnostics = svgd_step_(theta, scores, state, lr=0.1, clip_norm=clip_norm, **options)
        ends.append((theta, *state.values(), *diagnostics))
        assert torch.equal(scores, kept)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_scores_that_are_infinite_once_scaled_skip_the_step():
    theta = draw()
    found = svgd_step_(theta, draw(1), init_state(theta, "sgd"), optimizer="sgd", lr=0.1, score_scale=1e39)
    assert torch.equal(theta, draw())
    assert found.skipped == 1


def test_clipping_is_of_the_scores_by_their_joint_norm():
    theta, score = draw(), 10 * draw(1)
    holder = torch.nn.Parameter(theta.clone())
    holder.grad = score.clone()
    torch.nn.utils.clip_grad_norm_([holder], 0.7)
    expected = theta + svgd_direction(theta, holder.grad).direction
    svgd_step_(theta, score, init_state(theta, "sgd"), optimizer="sgd", lr=1.0, clip_norm=0.7)
    torch.testing.assert_close(theta, expected)


def test_clipping_leaves_small_scores_and_the_repulsion_alone():
    results = []
    for clip_norm in (None, 1e4):
        theta = draw()
        svgd_step_(theta, draw(1), init_state(theta, "sgd"), optimizer="sgd", lr=1.0, clip_norm=clip_norm)
        results.append(theta)
    assert torch.equal(*results)


def test_clipping_makes_the_diagnosed_drive_smaller_and_not_the_repulsion():
    theta, score = draw(), draw(1)
    state = init_state(theta, "sgd")
    plain, clipped = (
        svgd_step_(theta.clone(), score, state, optimizer="sgd", lr=0.1, clip_norm=clip_norm)
        for clip_norm in (None, 0.1 * score.norm().item())
    )
    assert clipped.drive_norm.item() == pytest.approx(0.1 * plain.drive_norm.item(), rel=1e-5)
    assert clipped.repulsion_norm == plain.repulsion_norm


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_bad_score_skips_the_step(optimizer, clip_norm, bad):
    options = {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.1, "clip_norm": clip_norm}
    theta = draw()
    state = init_state(theta, optimizer)
    for t in range(3):
        svgd_step_(theta, score_at(theta, t), state, **options)
    before, state_before = theta.clone(), {name: tensor.clone() for name, tensor in state.items()}
    score = score_at(theta, 3)
    score[2, 17] = bad
    for times in (1, 2):
        found = svgd_step_(theta, score, state, **options)
        assert torch.equal(theta, before)
        assert all(torch.equal(state[name], state_before[name]) for name in state if name != "skipped")
        assert state["skipped"] == found.skipped == times
        assert found.bandwidth.isfinite()

    # and the run goes on as if nothing had happened
    undisturbed, undisturbed_state = before.clone(), state_before
    svgd_step_(theta, score_at(before, 4), state, **options)
    svgd_step_(undisturbed, score_at(before, 4), undisturbed_state, **options)
    assert torch.equal(theta, undisturbed)
    assert not torch.equal(theta, before)
    assert state["step"] == 4
    assert undisturbed_state["skipped"] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bf16_scores_are_computed_with_in_fp32(optimizer):
    results = []
    for convert in (torch.Tensor.bfloat16, lambda score: score.bfloat16().float()):
        theta = draw()
        state = init_state(theta, optimizer)
        for t in range(5):
            svgd_step_(theta, convert(score_at(theta, t)), state, optimizer=optimizer, lr=0.1, clip_norm=1.0)
        results.append(theta)
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_is_in_place(optimizer):
    prompts = torch.nn.Parameter(draw(D=12).view(M, 3, 4))  # as a source stage holds them
    particles, before = prompts.data.view(M, 12), prompts.detach().clone()
    state = init_state(particles, optimizer)
    tensors = dict(state)
    svgd_step_(particles, draw(1, D=12), state, optimizer=optimizer, lr=0.1)
    assert not torch.equal(prompts.detach(), before)
    assert state.keys() == tensors.keys()
    assert all(state[name] is tensor for name, tensor in tensors.items())
    assert tensors["step"] == 1


def test_states_are_plain_tensors_that_resume_to_the_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    assert init_state(draw(), "sgd").keys() == {"step", "skipped"}
    theta = draw()
    state = init_state(theta, "adamw")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "exp_avg": (M, D),
        "exp_avg_sq": (M, D),
        "step": (),
        "skipped": (),
    }
    for t in range(3):
        svgd_step_(theta, score_at(theta, t), state, lr=0.1)
    save_file(state | {"particles": theta}, tmp_path / "state.safetensors")
    resumed_state = load_file(tmp_path / "state.safetensors")
    resumed = resumed_state.pop("particles")
    for particles, its_state in ((theta, state), (resumed, resumed_state)):
        svgd_step_(particles, score_at(particles, 3), its_state, lr=0.1)
    assert torch.equal(theta, resumed)
    assert torch.equal(state["step"], resumed_state["step"])


def test_kernel_mean_is_off_the_diagonal():
    theta = draw()
    K = svgd_direction(theta, theta).kernel.double()
    expected = sum(K[i, j] for i in range(M) for j in range(M) if i != j) / (M * (M - 1))
    found = svgd_step_(theta, theta.clone(), init_state(theta, "sgd"), optimizer="sgd", lr=0.1)
    assert found.kernel_mean.item() == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_mean_of_particles_far_apart_does_not_cancel():
    theta = torch.tensor([[0.0], [5.0]])  # e^-25 = 1.4e-11 is below the rounding of the diagonal's 1
    found = svgd_step_(theta, theta.clone(), init_state(theta, "sgd"), optimizer="sgd", lr=0.1, bandwidth=1.0)
    assert found.kernel_mean.item() == pytest.approx(math.exp(-25), rel=1e-5)


def test_one_particle_is_plain_optimisation():
    start, score = draw(M=1), draw(1, M=1)
    theta = start.clone()
    found = svgd_step_(theta, score, init_state(theta, "sgd"), optimizer="sgd", lr=0.5)
    torch.testing.assert_close(theta, start + 0.5 * score)
    assert (found.bandwidth, found.damping, found.kernel_mean, found.repulsion_norm) == (1, 1, 1, 0)


@pytest.mark.parametrize("bandwidth", ["median_log", "median", "printed", 2.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_read_back_by_the_host(optimizer, bandwidth):
    """Fake tensors hold no values: an item(), a float() or a branch on one raises."""
    for damping in ("paper", "matched", "none", 0.5):
        with FakeTensorMode():
            theta = torch.empty(M, D)
            state = init_state(theta, optimizer)
            options = {"bandwidth": bandwidth, "damping": damping, "clip_norm": 1.0, "weight_decay": 0.1}
            found = svgd_step_(theta, torch.empty(M, D), state, optimizer=optimizer, lr=0.1, **options)
        assert all(value.shape == () for value in found)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"lr": bad}, "lr must be") for bad in (-0.1, NAN, INF, None, "0.3", torch.tensor(NAN), torch.ones(2))),
        *(({"optimizer": bad}, "optimizer must be one of adamw, adam, sgd") for bad in ("lamb", "AdamW", None)),
        *(({"betas": bad}, "betas") for bad in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), 0.9, None)),
        *(({"eps": bad}, "eps") for bad in (-1e-8, NAN, None)),
        *(({"weight_decay": bad}, "weight_decay") for bad in (-0.1, NAN, INF, None)),
        *(({"clip_norm": bad}, "clip_norm") for bad in (0.0, -1.0, NAN, "1")),
        *(({"score_scale": bad}, "score_scale") for bad in (NAN, INF, None, "1")),
        ({"bandwidth": "mean"}, "bandwidth"),
        ({"damping": 0.0}, "damping"),
        ({"repulsion_scale": -1.0}, "repulsion_scale"),
        ({"backend": "cuda"}, "backend must be one of auto, reference"),
    ],
)
def test_bad_options_are_refused_and_nothing_moves(options, message):
    theta = draw()
    state = init_state(theta, "adamw")
    with pytest.raises(ValueError, match=message) as error:
        svgd_step_(theta, draw(1), state, **({"lr": 0.1} | options))
    assert "\n" not in str(error.value)
    assert torch.equal(theta, draw())
    assert state["step"] == 0


def test_bad_tensors_are_refused_by_name():
    theta = draw()
    state = init_state(theta, "adamw")
    with pytest.raises(ValueError, match="particles must be"):
        svgd_step_(theta[0], theta[0], state, lr=0.1)
    with pytest.raises(ValueError, match="scores have shape"):
        svgd_step_(theta, theta[:2], state, lr=0.1)
    with pytest.raises(ValueError, match=r"state for sgd must hold step, skipped, not exp_avg"):
        svgd_step_(theta, theta.clone(), state, optimizer="sgd", lr=0.1)
    with pytest.raises(ValueError, match=r"state for adamw must hold exp_avg.* not step, skipped"):
        svgd_step_(theta, theta.clone(), init_state(theta, "sgd"), lr=0.1)
    with pytest.raises(ValueError, match=r"state exp_avg must have shape \(5, 60\), not \(2, 60\)"):
        svgd_step_(theta, theta.clone(), init_state(theta[:2], "adamw"), lr=0.1)
    with pytest.raises(ValueError, match=r"state exp_avg is torch.float64"):
        svgd_step_(theta, theta.clone(), init_state(theta.double(), "adamw"), lr=0.1)
    with pytest.raises(ValueError, match="state exp_avg is on meta"):
        svgd_step_(theta, theta.clone(), init_state(theta.to("meta"), "adamw"), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must be one of"):
        init_state(theta, "lamb")
    with pytest.raises(ValueError, match="particles must be"):
        init_state(theta[0], "adamw")
