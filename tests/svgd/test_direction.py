"""svgd_direction against an evaluation with Python loops and floats, which shares no code with the package."""

import math

import pytest
import torch

from bmtpt_ds.svgd import svgd_direction

BANDWIDTHS = ["median_log", "median", "printed", 7.5]
DAMPINGS = ["paper", "matched", "none", 0.25]
SIZES = [(1, 9), (2, 7), (3, 11), (4, 6), (5, 40), (10, 24), (32, 12)]  # M = 32, D = 12: paper's lambda clips at 1


def evaluate(theta, score, bandwidth="median_log", damping="paper", repulsion_scale=1.0):
    """phi, K, h and lambda of damped SVGD (paper, Appendix B) on nested lists of doubles."""
    M, D = len(theta), len(theta[0])
    if M == 1:
        return [list(score[0])], [[1.0]], 1.0, 1.0
    r2 = [[math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in theta] for x in theta]
    pairs = sorted(r2[i][j] for i in range(M) for j in range(M) if i < j)
    n = len(pairs)
    median = pairs[n // 2] if n % 2 else 0.5 * (pairs[n // 2 - 1] + pairs[n // 2])
    if bandwidth == "median_log":
        h = median / math.log(M + 1)
    elif bandwidth == "median":
        h = median
    elif bandwidth == "printed":
        h = median**2 / math.log(M + 1)
    else:
        h = bandwidth
    h = max(h, 1e-12)
    c = median / h
    if damping == "paper":
        lam = min(1.0, (1 + M / D) / math.e)
    elif damping == "matched":
        lam = (1 + c * M / D) * math.exp(-c)
    elif damping == "none":
        lam = 1.0
    else:
        lam = damping
    K = [[math.exp(-r2[i][j] / h) for j in range(M)] for i in range(M)]

    def entry(i, d):
        drive = math.fsum((lam if i == j else K[i][j]) * score[j][d] for j in range(M))
        repulsion = math.fsum(2 / h * K[i][j] * (theta[i][d] - theta[j][d]) for j in range(M))
        return (drive + repulsion_scale * repulsion) / M

    return [[entry(i, d) for d in range(D)] for i in range(M)], K, h, lam


def draw(M, D, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(M, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def relative(found, expected):
    """Norm of the difference over the norm expected, in float64; 0 where both are nothing."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (found.double() - expected).norm()
    return (difference / expected.norm()).item() if expected.norm() > 0 else difference.item()


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize(("M", "D"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_equals_the_loops(M, D, bandwidth, dtype, tolerance):
    theta, score = draw(M, D, dtype)
    for damping in DAMPINGS:
        for scale in (1.0, 0.0, 3.5):
            found = svgd_direction(theta, score, bandwidth=bandwidth, damping=damping, repulsion_scale=scale)
            phi, K, h, lam = evaluate(theta.tolist(), score.tolist(), bandwidth, damping, scale)
            assert found.direction.dtype == dtype
            assert relative(found.direction, phi) < tolerance, (damping, scale)
            assert relative(found.kernel, K) < tolerance, (damping, scale)
            assert relative(found.bandwidth, h) < tolerance, (damping, scale)
            assert relative(found.damping, lam) < tolerance * 10, (damping, scale)  # e^-c magnifies c's rounding


def test_defaults_are_median_log_paper_and_scale_one():
    theta, score = draw(5, 30)
    phi, _, h, lam = evaluate(theta.tolist(), score.tolist(), "median_log", "paper", 1.0)
    found = svgd_direction(theta, score)
    assert relative(found.direction, phi) < 1e-10
    assert found.bandwidth.item() == pytest.approx(h)
    assert found.damping.item() == pytest.approx(lam)


def test_the_papers_setting_damps_by_0368():
    theta, score = draw(5, 102_400, torch.float32)
    assert svgd_direction(theta, score).damping.item() == pytest.approx(0.368, abs=5e-4)


def test_equally_far_particles_have_one_drive_with_median_and_the_papers_damping():
    """K is 1/e between any two, and so is lambda but for M / D: each has the same sum of all scores."""
    theta, D = torch.eye(5, 10_000, dtype=torch.float64) * 40, 10_000
    _, score = draw(5, D)
    found = svgd_direction(theta, score, bandwidth="median", repulsion_scale=0.0).direction
    common = score.sum(0) / (5 * math.e)
    assert all(relative(of_one, common) < 2 * 5 / D for of_one in found)
    apart = svgd_direction(theta, score, bandwidth="median", damping="none", repulsion_scale=0.0).direction
    assert all(relative(of_one, common) > 0.5 for of_one in apart)


def test_printed_bandwidth_silences_the_repulsion():
    theta, score = draw(5, 5000)
    usual, printed = (svgd_direction(theta, score, bandwidth=b).repulsion_norm for b in ("median_log", "printed"))
    assert printed < 1e-3 * usual


def test_drive_and_repulsion_norms_are_those_of_the_two_terms():
    theta, score = draw(5, 30)
    whole = svgd_direction(theta, score, repulsion_scale=2.0)
    drive = svgd_direction(theta, score, repulsion_scale=0.0).direction
    repulsion = svgd_direction(theta, torch.zeros_like(score), repulsion_scale=2.0).direction
    assert whole.drive_norm.item() == pytest.approx(drive.norm().item())
    assert whole.repulsion_norm.item() == pytest.approx(repulsion.norm().item())
    assert relative(whole.direction, drive + repulsion) < 1e-12


def test_tiny_damping_is_set_and_not_subtracted():
    """1 - (1 - 1e-9) is 0 in fp32; with one other particle far away a score of its own is all that a particle has."""
    theta, score = torch.tensor([[0.0, 0.0], [1e3, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = svgd_direction(theta, score, bandwidth=1.0, damping=1e-9, repulsion_scale=0.0).direction
    assert relative(found, 0.5e-9 * score.double()) < 1e-6


def test_repulsion_is_the_kernels_gradient():
    """sum_j grad_{theta_j} k(theta_j, theta_i), by central differences with h held fixed."""
    M, D, step = 4, 5, 1e-5
    theta, _ = draw(M, D)
    h = svgd_direction(theta, torch.zeros_like(theta)).bandwidth.item()
    kernel = lambda x, y: math.exp(-((x - y) ** 2).sum().item() / h)  # noqa: E731
    expected = torch.zeros(M, D, dtype=torch.float64)
    for i in range(M):
        for j in range(M):
            for d in range(D):
                nudge = torch.zeros(D, dtype=torch.float64)
                nudge[d] = step
                slope = (kernel(theta[j] + nudge, theta[i]) - kernel(theta[j] - nudge, theta[i])) / (2 * step)
                expected[i, d] += slope / M
    for bandwidth in ("median_log", h):
        found = svgd_direction(theta, torch.zeros_like(theta), bandwidth=bandwidth).direction
        assert relative(found, expected) < 1e-8


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("M", [2, 4, 5])
def test_coincident_particles_move_together(M, bandwidth, damping):
    _, score = draw(M, 8, torch.float32)
    theta = torch.full((M, 8), 1.5)
    found = svgd_direction(theta, score, bandwidth=bandwidth, damping=damping)
    assert all(part.isfinite().all() for part in found)
    assert found.repulsion_norm == 0
    if damping == "none":
        torch.testing.assert_close(found.direction, score.mean(0).expand_as(score))


def test_most_but_not_all_particles_coincide():
    """The median distance is 0 and h at its floor; the one apart must not turn into inf or nan."""
    theta, score = torch.zeros(5, 6), draw(5, 6, torch.float32)[1]
    theta[4] = 2.0
    for damping in DAMPINGS:
        found = svgd_direction(theta, score, damping=damping)
        assert found.bandwidth.item() == pytest.approx(1e-12)
        assert found.direction.isfinite().all()


@pytest.mark.parametrize("bandwidth", ["median_log", "median"])
def test_a_far_outlier_leaves_the_bandwidth_and_goes_its_own_way(bandwidth):
    theta, score = draw(5, 12, torch.float32)
    near = svgd_direction(theta, score, bandwidth=bandwidth)
    theta[4] += 1e6
    found = svgd_direction(theta, score, bandwidth=bandwidth)
    phi, _, h, lam = evaluate(theta.tolist(), score.tolist(), bandwidth)
    assert relative(found.direction, phi) < 1e-6
    assert found.bandwidth.item() == pytest.approx(h)
    assert h < 3 * near.bandwidth.item()
    torch.testing.assert_close(found.direction[4], lam / 5 * score[4])


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-4])
def test_small_differences_far_from_the_origin(gap):
    """Magnitude 30, neighbours `gap` apart: a Gram product or diag(K 1) theta - K theta would lose every digit."""
    theta, score = draw(5, 64, torch.float32)
    theta = 30 * theta[:1] + gap * theta
    for scores in (torch.zeros_like(score), score):
        found = svgd_direction(theta, scores)
        assert relative(found.direction, evaluate(theta.tolist(), scores.tolist())[0]) < 1e-6


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_one_particle_follows_its_score(bandwidth, damping):
    theta, score = draw(1, 10, torch.float32)
    found = svgd_direction(theta, score, bandwidth=bandwidth, damping=damping, repulsion_scale=2.0)
    assert torch.equal(found.direction, score)
    assert found.bandwidth == 1
    assert found.damping == 1
    assert torch.equal(found.kernel, torch.ones(1, 1))
    assert found.repulsion_norm == 0


def test_the_median_of_six_pairs_is_the_mean_of_the_middle_two():
    theta = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # squared distances 1, 4, 9, 16, 36, 49
    found = svgd_direction(theta, torch.zeros_like(theta), bandwidth="median")
    assert found.bandwidth.item() == 12.5


def test_the_kernel_is_undamped_and_symmetric():
    theta, score = draw(6, 20)
    found = svgd_direction(theta, score, damping=0.1)
    assert torch.equal(found.kernel.diagonal(), torch.ones(6, dtype=torch.float64))
    assert torch.equal(found.kernel, found.kernel.T)


def test_scores_of_another_dtype_are_computed_with_in_the_particles():
    theta, score = draw(5, 33, torch.float32)
    assert svgd_direction(theta, score.double()).direction.dtype == torch.float32
    found = svgd_direction(theta, score.bfloat16())
    assert found.direction.dtype == torch.float32
    assert torch.equal(found.direction, svgd_direction(theta, score.bfloat16().float()).direction)
    assert relative(found.direction, evaluate(theta.tolist(), score.bfloat16().tolist())[0]) < 1e-6


def test_neither_autocast_nor_low_matmul_precision_reaches_it():
    theta, score = draw(5, 33, torch.float32)
    expected = svgd_direction(theta, score).direction
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(svgd_direction(theta, score).direction, expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_inputs_stay_as_they_were_and_no_graph_is_built():
    theta, score = draw(4, 9, torch.float32)
    theta.requires_grad_()
    before = theta.detach().clone(), score.clone()
    found = svgd_direction(theta, score)
    assert torch.equal(theta, before[0])
    assert torch.equal(score, before[1])
    assert not found.direction.requires_grad


def test_backend_by_name():
    theta, score = draw(3, 5)
    assert torch.equal(
        svgd_direction(theta, score, backend="reference").direction, svgd_direction(theta, score).direction
    )
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference.*not 'cuda'"):
        svgd_direction(theta, score, backend="cuda")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"bandwidth": bad}, "bandwidth must be .*median_log") for bad in ("mean", 0, -1.0, NAN, INF, None, True)),
        *(({"damping": bad}, "damping must be .*matched") for bad in ("papers", 0.0, 1.1, -0.5, NAN, INF, None, True)),
        *(({"repulsion_scale": bad}, "repulsion_scale") for bad in (-1.0, NAN, INF, "1", None)),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    theta, score = draw(3, 5)
    with pytest.raises(ValueError, match=message) as error:
        svgd_direction(theta, score, **options)
    assert "\n" not in str(error.value)


def test_bad_tensors_are_refused_by_name():
    theta, score = draw(3, 5)
    with pytest.raises(ValueError, match=r"particles must be \[M, D\].*\(3, 1, 5\)"):
        svgd_direction(theta[:, None], score[:, None])
    with pytest.raises(ValueError, match=r"particles .*\(0, 5\)"):
        svgd_direction(theta[:0], score[:0])
    with pytest.raises(ValueError, match=r"scores have shape \(2, 5\), but particles \(3, 5\)"):
        svgd_direction(theta, score[:2])
    with pytest.raises(ValueError, match=r"particles .*bfloat16"):
        svgd_direction(theta.bfloat16(), score)
    with pytest.raises(ValueError, match=r"scores .*int64"):
        svgd_direction(theta, score.long())
    with pytest.raises(ValueError, match="scores are on meta"):
        svgd_direction(theta, score.to("meta"))
