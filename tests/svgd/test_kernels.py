"""The kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter."""

import itertools
import math

import pytest
import torch

from bmtpt_ds.svgd import choose_backend, init_state, svgd_direction, svgd_step_
from bmtpt_ds.svgd.fused import Fused, Grid
from bmtpt_ds.triton_support import is_interpreted

pytest.importorskip("triton")

from bmtpt_ds.svgd import device_functions

GENERATION, ARRIVALS = device_functions.GENERATION.value, device_functions.ARRIVALS.value
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BANDWIDTHS = ["median_log", "median", "printed", "number"]
DAMPINGS = ["paper", "matched", "none", 0.25]
OPTIONS = list(itertools.product(BANDWIDTHS, DAMPINGS))
MS, DS = [1, 2, 3, 5, 8, 10, 16, 32], [1, 7, 1000, 1024, 5000]
SIZES = list(itertools.product(MS, DS))


def slow(*values):
    """A case that takes the interpreter long, beside another of its kind that does not."""
    return pytest.param(*values, marks=pytest.mark.slow)


# wide tiles, for the interpreter's time goes by the operation; on a GPU as registers allow
ONE = Fused(programs=1, block=1024) if is_interpreted() else Fused()
SEVERAL = Fused(programs=3, block=512) if is_interpreted() else Fused(one_launch=False)


def draw(M, D, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * M + D + seed)
    theta, score = (torch.randn(M, D, generator=generator) for _ in range(2))
    return (theta * scale).to(DEVICE), score.to(DEVICE)


def relative(found, expected):
    """Norm of the difference over the norm expected, in float64; 0 where both are nothing."""
    found, expected = found.double(), expected.double()
    difference = (found - expected).norm()
    return (difference / expected.norm()).item() if expected.norm() > 0 else difference.item()


def check_direction(theta, score, backend, **options):
    if options.get("bandwidth") == "number":  # of the order of the distances, or all kernel values are 0 in float32
        options["bandwidth"] = 0.7 * theta.shape[1]
    found = svgd_direction(theta, score, backend=backend, **options)
    right = svgd_direction(theta.double(), score.double(), backend="reference", **options)
    assert found.direction.dtype == torch.float32
    assert relative(found.direction, right.direction) < 1e-5, options
    assert relative(found.kernel, right.kernel) < 1e-5, options
    for name in ("bandwidth", "damping", "drive_norm", "repulsion_norm"):
        assert relative(getattr(found, name), getattr(right, name)) < 2e-5, (name, options)


@pytest.mark.parametrize(("M", "D"), [slow(*size) if size[0] == 32 and size[1] in DS[:4] else size for size in SIZES])
def test_direction_in_one_launch(M, D):
    """Every size; each meets two of the sixteen options, all sizes together meet all of them."""
    theta, score = draw(M, D)
    for bandwidth, damping in (OPTIONS[(3 * SIZES.index((M, D))) % 16], OPTIONS[(7 * SIZES.index((M, D)) + 4) % 16]):
        check_direction(theta, score, ONE, bandwidth=bandwidth, damping=damping)


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize(("bandwidth", "damping"), OPTIONS)
def test_all_options(bandwidth, damping, turn):
    """Each meets every size and every scale of the repulsion, all options together every pair of the two."""
    M, D = ((3, 7), (5, 1000), (10, 130))[turn]
    scale = (1.0, 0.0, 3.5)[(turn + OPTIONS.index((bandwidth, damping))) % 3]
    check_direction(*draw(M, D), ONE, bandwidth=bandwidth, damping=damping, repulsion_scale=scale)


@pytest.mark.parametrize(
    ("M", "D"), [(1, 5000), (2, 1024), (5, 5000), (8, 1000), (10, 5000), (16, 1024), slow(32, 1000)]
)
@pytest.mark.parametrize("backend", [ONE, SEVERAL], ids=["one launch", "two launches"])
def test_magnitudes_of_real_prompts(M, D, backend):
    """A trained prompt has a standard deviation of 10 to 100; the particles lie close to each other beside that."""
    theta, score = draw(M, D, scale=30)
    check_direction(theta, score, backend)
    together = 30 * torch.randn(1, D, generator=torch.Generator().manual_seed(1)).to(DEVICE) + theta / 300
    check_direction(together, score, backend)


@pytest.mark.parametrize("backend", [ONE, SEVERAL], ids=["one launch", "two launches"])
@pytest.mark.parametrize("bandwidth", ["median_log", "median", 1.0])
@pytest.mark.parametrize("M", [2, 5, 16])
def test_collapsed_particles(M, bandwidth, backend):
    theta, score = draw(M, 300, scale=30)
    check_direction(theta[:1].expand(M, -1).clone(), score, backend, bandwidth=bandwidth)  # all in one place
    theta[1] = theta[0]
    check_direction(theta, score, backend, bandwidth=bandwidth)  # two of them


@pytest.mark.parametrize("backend", [ONE, SEVERAL], ids=["one launch", "two launches"])
@pytest.mark.parametrize("bandwidth", ["median_log", "median"])
@pytest.mark.parametrize("M", [3, 5, 10])
def test_one_far_outlier(M, bandwidth, backend):
    theta, score = draw(M, 700)
    theta[-1] += 1e4
    check_direction(theta, score, backend, bandwidth=bandwidth, damping="matched")


@pytest.mark.parametrize(("M", "D"), [(1, 7), (3, 5000), (5, 1024), (10, 1000), slow(32, 600)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_launches_of_several_programs_equal_one(M, D, optimizer):
    options = {"optimizer": optimizer, "lr": 0.3, "weight_decay": 0.1, "clip_norm": 0.5}
    ends = []
    for backend in (ONE, SEVERAL):
        theta, score = draw(M, D)
        state = init_state(theta, optimizer)
        for _ in range(2):
            diagnostics = svgd_step_(theta, score, state, backend=backend, **options)
        ends.append((theta, *(d.clone() for d in diagnostics), *state.values()))
    for one, two in zip(*ends, strict=True):
        assert relative(one, two) < 1e-5


def pull(theta, t):
    """Of a Gaussian away from the origin, with noise of step t as sampled rows give."""
    noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(t)).to(DEVICE)
    return (2.0 - theta) * 3.0 + noise


@pytest.mark.parametrize(
    ("backend", "weight_decay"),
    [slow(ONE, 0.0), (ONE, 0.1), slow(SEVERAL, 0.1)],
    ids=["one launch", "one launch, weight decay", "two launches, weight decay"],
)
def test_100_steps_are_torchs_adamw_fed_with_minus_phi(backend, weight_decay):
    (theta, _), betas = draw(3, 200), (0.8, 0.99)
    theirs = torch.nn.Parameter(theta.clone())
    torchs = torch.optim.AdamW([theirs], betas=betas, eps=1e-6, weight_decay=weight_decay, foreach=False)
    state, start = init_state(theta, "adamw"), theta.clone()
    for t in range(100):
        lr = 0.1 * (1 - t / 100) * min(1, (t + 1) / 10)
        torchs.param_groups[0]["lr"] = lr
        theirs.grad = -svgd_direction(theirs.detach(), pull(theirs.detach(), t), backend="reference").direction
        torchs.step()
        svgd_step_(
            theta, pull(theta, t), state, lr=lr, betas=betas, eps=1e-6, weight_decay=weight_decay, backend=backend
        )
    assert relative(theta, theirs.detach()) < 1e-5
    for name in ("exp_avg", "exp_avg_sq"):
        assert relative(state[name], torchs.state[theirs][name]) < 1e-5
    assert state["step"] == 100
    assert (theta - start).abs().mean() > 0.5  # it went somewhere


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
def test_a_step_is_the_references(optimizer, dtype, clip_norm):
    options = {"optimizer": optimizer, "lr": 0.25, "weight_decay": 0.1, "clip_norm": clip_norm, "damping": "matched"}
    (theta, score), (again, _) = draw(5, 300), draw(5, 300)
    ours, theirs = init_state(theta, optimizer), init_state(theta, optimizer)
    for _ in range(2):
        found = svgd_step_(theta, score.to(dtype), ours, backend=ONE, **options)
        right = svgd_step_(again, score.to(dtype), theirs, backend="reference", **options)
        for one, two in zip(found, right, strict=True):
            assert relative(one, two) < 1e-5
    assert relative(theta, again) < 1e-5  # as a whole: where a score is almost 0, Adam's step goes by its rounding
    assert ours["step"] == theirs["step"] == 2


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", [ONE, SEVERAL], ids=["one launch", "two launches"])
@pytest.mark.parametrize("M", [3, 10])  # held in registers, read twice
def test_scaled_scores_are_the_references(M, backend):
    (theta, gradient), (again, _) = draw(M, 700), draw(M, 700)
    ours, theirs = init_state(theta, "sgd"), init_state(theta, "sgd")
    options = {"optimizer": "sgd", "lr": 0.25, "clip_norm": 50.0}
    for _ in range(2):
        found = svgd_step_(theta, gradient, ours, score_scale=-3.0, backend=backend, **options)
        right = svgd_step_(again, -3.0 * gradient, theirs, backend="reference", **options)
        for one, two in zip(found, right, strict=True):
            assert relative(one, two) < 1e-5
    assert relative(theta, again) < 1e-6
    svgd_step_(theta, gradient, ours, score_scale=-1e39, backend=backend, **options)  # infinite in float32
    assert ours["skipped"] == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", [ONE, SEVERAL], ids=["one launch", "two launches"])
@pytest.mark.parametrize(
    ("bad", "optimizer"),
    [
        *((math.nan, "adamw"), (math.inf, "sgd"), (-math.inf, "adamw")),
        *(slow(*case) for case in ((math.nan, "sgd"), (math.inf, "adamw"), (-math.inf, "sgd"))),
    ],
)
def test_one_bad_score_skips_the_step(optimizer, bad, backend):
    options = {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.1, "clip_norm": 1.0, "backend": backend}
    theta, score = draw(5, 1100)
    state = init_state(theta, optimizer)
    svgd_step_(theta, score, state, **options)
    before, state_before = theta.clone(), {name: tensor.clone() for name, tensor in state.items()}
    poisoned = score.clone()
    poisoned[2, 1017] = bad
    for times in (1, 2):
        found = svgd_step_(theta, poisoned, state, **options)
        assert torch.equal(theta, before)
        assert all(torch.equal(state[name], state_before[name]) for name in state if name != "skipped")
        assert found.skipped == state["skipped"] == times
        assert found.bandwidth.isfinite()
        assert not found.drive_norm.isfinite()
    svgd_step_(theta, score, state, **options)
    svgd_step_(before, score, state_before, **options)
    assert torch.equal(theta, before)
    assert state["step"] == 2


def test_the_same_to_the_bit_every_time():
    ends = []
    for _ in range(2):
        theta, score = draw(5, 3000)
        state = init_state(theta, "adamw")
        for _ in range(3):
            svgd_step_(theta, score, state, lr=0.3, clip_norm=1.0, backend=SEVERAL)
        ends.append((theta, *state.values()))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("backend", [ONE, SEVERAL], ids=["one launch", "two launches"])
def test_a_launch_that_was_broken_off_leaves_no_trace(backend):
    """Programs that arrived at the barrier, or drew a ticket, and never came to the end."""
    theta, score = draw(5, 3000)
    state = init_state(theta, "adamw")
    svgd_step_(theta, score, state, lr=0.3, backend=backend)
    expected, expected_state = theta.clone(), init_state(theta, "adamw")
    for name, tensor in expected_state.items():
        tensor.copy_(state[name])
    state.workspace.epoch += 1  # the host had counted it
    generation = state.workspace.sync[GENERATION] + state.workspace.epoch
    state.workspace.sync[:GENERATION] = generation * ARRIVALS + torch.tensor([3, 1], device=DEVICE)
    found = svgd_step_(theta, score, state, lr=0.3, backend=backend)
    svgd_step_(expected, score, expected_state, lr=0.3, backend=backend)
    assert torch.equal(theta, expected)
    assert state["step"] == 2
    assert found.drive_norm > 0


@pytest.mark.parametrize(
    ("said", "goes_on"),
    [
        ("Triton Error [CUDA]: too many blocks in cooperative launch", True),
        ("Triton Error [CUDA]: operation not supported", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", False),
    ],
)
def test_where_the_driver_refuses_a_cooperative_launch_two_launches_do(monkeypatch, caplog, said, goes_on):
    from bmtpt_ds.svgd import kernels

    class Driver:
        """Refuses the fused kernel, as a driver would: with nothing done."""

        def __init__(self, kernel):
            self.kernel, self.refused = kernel, 0

        def __getitem__(self, grid):
            def launch(**arguments):
                if arguments["FUSED"]:
                    self.refused += 1
                    raise RuntimeError(said)
                return self.kernel[grid](**arguments)

            return launch

    driver = Driver(kernels.step_kernel)
    theta, score = draw(5, 300)
    expected, (state, expected_state) = theta.clone(), (init_state(theta, "adamw") for _ in range(2))
    for _ in range(2):
        svgd_step_(expected, score, expected_state, lr=0.3, backend="reference")
    monkeypatch.setattr(kernels, "step_kernel", driver)
    if not goes_on:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            svgd_step_(theta, score, state, lr=0.3, backend=ONE)
        return
    for _ in range(2):
        svgd_step_(theta, score, state, lr=0.3, backend=ONE)
    assert driver.refused == 1  # and is not asked again
    assert [record.message.split(":")[0] for record in caplog.records] == ["SVGD takes two launches a step"]
    assert relative(theta, expected) < 1e-5
    assert state["step"] == 2


def test_a_step_replayed_with_its_old_epoch_is_a_step_like_others():
    """As a captured graph does it, with other steps between."""
    theta, score = draw(5, 300)
    expected, (state, expected_state) = theta.clone(), (init_state(theta, "adamw") for _ in range(2))
    for epoch in (1, 2, 3, 4, 2, 2, 7, 2):
        svgd_step_(expected, score, expected_state, lr=0.3, backend="reference")
        if state.workspace:
            state.workspace.epoch = epoch - 1
        svgd_step_(theta, score, state, lr=0.3, backend=ONE)
    assert state["step"] == 8  # a ticket of an older generation would have kept it from counting
    assert relative(theta, expected) < 1e-5


def test_buffers_are_made_once():
    theta, score = draw(5, 300)
    state = init_state(theta, "adamw")
    first = svgd_step_(theta, score, state, lr=0.3, backend=ONE)
    second = svgd_step_(theta, score, state, lr=0.3, backend=ONE)
    assert all(one is two for one, two in zip(first, second, strict=True))


def test_the_grid_covers_all_columns_with_at_most_one_program_a_multiprocessor():
    for M, D, most in itertools.product(MS, [1, 127, 128, 129, 5000, 76_800, 102_400, 1_048_576], [1, 3, 108, 132]):
        grid = Grid.plan(M, D, most)
        assert grid.programs <= most
        assert grid.programs * grid.tiles * grid.block >= D
        assert (grid.programs - 1) * grid.block < D  # none without columns
        assert not grid.held or grid.tiles == 1
    paper = Grid.plan(5, 102_400, 132)
    assert paper.held  # the paper's setting: inputs are read once
    assert paper.programs == 100


def test_auto_takes_kernels_on_a_gpu_alone():
    theta, _ = draw(5, 300)
    expected = "triton" if DEVICE.type == "cuda" else "reference"
    assert choose_backend(theta).describe(theta).startswith(expected)
    assert choose_backend(theta.double()).describe(theta).startswith("reference")
    assert choose_backend(torch.zeros(33, 4, device=DEVICE)).describe(theta).startswith("reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda theta: theta.double(), "particles are float64, not float32"),
        (lambda theta: theta.repeat(7, 1), "there are 35 particles, more than 32"),
        (lambda theta: theta.T.contiguous().T, "particles are not contiguous"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_by_name(change, message):
    theta = change(draw(5, 30)[0])
    with pytest.raises(ValueError, match=f"backend triton cannot run here: {message}; use auto or reference"):
        svgd_direction(theta, theta, backend="triton")
    svgd_direction(theta, theta)  # auto goes another way
