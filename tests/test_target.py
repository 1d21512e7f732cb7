"""The target stage: priors against their formulas, the update against float64 finite differences, what a prior does."""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.config import Recipe, SourceConfig, TargetConfig
from bmtpt_ds.data.tokens import TokenRow, collate
from bmtpt_ds.errors import UserError
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.phases import Phases
from bmtpt_ds.target import Adaptation, Prior, _heed, _refuse_skipping, update
from tests.one_step import gradient_of_rows

CPU = torch.device("cpu")
ROWS = [TokenRow([5, 6, 7, 1], [40, 1]), TokenRow([8, 1], [41, 1]), TokenRow([9, 10, 11, 12, 1], [42, 43, 1])]
PARTICLES = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))


def test_gaussian_is_equation_6() -> None:
    theta = torch.randn(4, 32)
    centre = sum(PARTICLES.double()) / 3
    expected = ((theta.double() - centre) ** 2).sum() / (2 * 0.7**2)
    assert Prior("gaussian", PARTICLES, 0.7).negative_log(theta[None]).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_mixture_is_equation_4() -> None:
    theta = PARTICLES[1] + 0.1 * torch.randn(4, 32)
    sigma = 3.0
    densities = [math.exp(-((theta - p).double() ** 2).sum().item() / (2 * sigma**2)) for p in PARTICLES]
    expected = -math.log(sum(densities) / 3)
    assert Prior("mixture", PARTICLES, sigma).negative_log(theta[None]).item() == pytest.approx(expected, rel=1e-4)


def test_mixture_with_one_particle_equals_gaussian() -> None:
    theta = torch.randn(2, 4, 32)
    one = PARTICLES[:1]
    torch.testing.assert_close(
        Prior("mixture", one, 2.0).negative_log(theta), Prior("gaussian", one, 2.0).negative_log(theta)
    )


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "none"])
def test_every_prompt_has_a_prior_of_its_own(kind: str) -> None:
    theta, prior = torch.randn(5, 4, 32), Prior(kind, PARTICLES, 3.0)
    alone = torch.cat([prior.negative_log(theta[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(prior.negative_log(theta), alone)


def test_gaussian_bounds_mixture_as_jensen_says() -> None:
    """Eq. 5: up to the constant, the bound lies above the exact prior."""
    theta = torch.randn(1, 4, 32)
    sigma = 5.0
    spread = (PARTICLES - PARTICLES.mean(0)).square().sum() / 3 / (2 * sigma**2)  # the constant C
    exact = Prior("mixture", PARTICLES, sigma).negative_log(theta)
    assert Prior("gaussian", PARTICLES, sigma).negative_log(theta) + spread >= exact


def objective(backbone, parameters: list[torch.Tensor], prior: Prior, task_of: list[int]) -> torch.Tensor:
    """Eq. 6 in float64: the mean over rows, each alone, of its loss and of the prior of its task's prompt."""
    theta = ComposedPrompt(*parameters).compose()
    losses = []
    for row, k in zip(ROWS, task_of, strict=True):
        loss = backbone.row_losses(theta[k : k + 1], collate([[row]], 0).on(CPU))[0]
        losses.append(loss + prior.negative_log(theta[k : k + 1])[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("task_of", [[0, 0, 0], [0, 1, 0], [2, 0, 2]], ids=["one", "two", "one of three absent"])
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "none"])
def test_update_follows_the_gradient_of_equation_6(loaded, kind: str, task_of: list[int]) -> None:
    """Plain gradient descent moves W, a and b by learning rate times the finite differences of the objective."""
    target = TargetConfig(
        optimizer="sgd", lr_full=2.0, lr_low_rank=0.5, clip_norm=None, warmup_steps=0, steps=10, prior=kind, sigma=3.0
    )
    tasks = max(task_of) + 1
    prior = Prior(kind, PARTICLES, 3.0)
    adaptation = Adaptation(TunedPrompt.begin(prior.centre[None], tasks), target)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adaptation.tuned.tensors():
            tensor += 0.3 * torch.randn(tensor.shape, generator=draw)
    before = [t[0].clone().double() for t in adaptation.tuned.tensors()]
    gradient_pass, theta = GradientPass(loaded, 0, 10**9, 0, Phases(CPU)), adaptation.tuned.compose()[0]
    found = gradient_of_rows(gradient_pass, theta, ROWS, prompt_of=task_of)
    counts = torch.bincount(torch.tensor(task_of), minlength=tasks)[None].float()
    update(target, adaptation, prior, found.gradients, found.losses, counts, 1, loaded.ranks, Phases(CPU))
    prior_loss = adaptation.prior[0] / len(ROWS)

    exact = copy.deepcopy(loaded.backbone).double()
    prior64 = Prior(kind, PARTICLES.double(), 3.0)
    with torch.no_grad():
        whole = objective(exact, before, prior64, task_of).item()
    assert (found.losses.sum() + prior_loss).item() == pytest.approx(whole, rel=1e-4)
    moved = [(old - new[0]).flatten() for old, new in zip(before, adaptation.tuned.tensors(), strict=True)]
    for which, rate in enumerate((2.0, 0.5, 0.5)):
        for entry in range(0, before[which].numel(), max(1, before[which].numel() // 5)):

            def along(shift: float, which: int = which, entry: int = entry) -> float:
                shifted = [t.clone() for t in before]
                shifted[which].view(-1)[entry] += shift
                with torch.no_grad():
                    return objective(exact, shifted, prior64, task_of).item()

            # fourth order with a wide step: T5's layer norm rounds to float32 whatever the model's dtype
            h = 1e-2
            difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
            assert moved[which][entry].item() == pytest.approx(rate * difference, rel=2e-3, abs=1e-4)
    for k in set(range(tasks)) - set(task_of):
        assert moved[1].view(tasks, -1)[k].eq(0).all() and moved[2].view(tasks, -1)[k].eq(0).all()


def drift(loaded, sigma: float, kind: str = "gaussian") -> float:
    """How far 60 steps of Adam take the prompt, relative to the centre."""
    target = TargetConfig(steps=60, warmup_steps=5, prior=kind, sigma=sigma, lr_full=0.05, lr_low_rank=0.05)
    prior = Prior(kind, PARTICLES, sigma)
    adaptation = Adaptation(TunedPrompt.begin(prior.centre[None], 1), target)
    gradient_pass = GradientPass(loaded, 0, 10**9, 0, Phases(CPU))
    for step in range(1, 61):
        found = gradient_of_rows(gradient_pass, adaptation.tuned.compose()[0], ROWS, step)
        update(
            target, adaptation, prior, found.gradients, found.losses, torch.ones(1, 1), step, loaded.ranks, Phases(CPU)
        )
    moved = adaptation.tuned.compose()[0, 0] - prior.centre
    return (moved.norm() / prior.centre.norm()).item()


def test_small_sigma_holds_the_prompt_at_the_centre(loaded) -> None:
    free, held = drift(loaded, 1e5), drift(loaded, 1e-3)
    assert free > 0.2
    assert held < 0.05 * free


class Alone:
    """The only rank."""

    def broadcast_(self, _: torch.Tensor) -> None: ...


def test_clipping_bounds_the_whole_gradient_of_each_run() -> None:
    target = TargetConfig(optimizer="sgd", lr_full=1.0, lr_low_rank=1.0, clip_norm=0.5, warmup_steps=0, steps=10)
    adaptation = Adaptation(TunedPrompt.begin(PARTICLES[:2], 2), target)
    before = [t.clone() for t in adaptation.tuned.tensors()]
    gradient = torch.ones(2, 2, 4, 32) * torch.tensor([1.0, 1e-5])[:, None, None, None]
    prior = Prior("none", PARTICLES, 1.0)
    update(
        target, adaptation, prior, [gradient.flatten(0, 1)], torch.ones(4), torch.ones(2, 2), 1, Alone(), Phases(CPU)
    )
    moved = [(t - b).flatten(1) for t, b in zip(adaptation.tuned.tensors(), before, strict=True)]
    norms = torch.cat(moved, dim=1).norm(dim=1)
    assert norms[0].item() == pytest.approx(0.5, rel=1e-4)
    assert 1e-4 < norms[1].item() < 0.4  # below the bound: as it was


def steps(adaptation: Adaptation, target: TargetConfig, prior: Prior, first: int, last: int, poisoned=()) -> None:
    """Steps with gradients of their own; those of the second run are not finite at the `poisoned` ones."""
    runs = len(adaptation.tuned.full)
    for step in range(first, last + 1):
        gradient = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(step))[-runs:]
        if step in poisoned:
            gradient[-1, 1, 2, 3] = torch.nan
        counts = torch.tensor([[16.0, 8.0, 8.0]]).repeat(runs, 1)
        losses = gradient.sum(dim=(2, 3)).flatten()
        update(target, adaptation, prior, [gradient.flatten(0, 1)], losses, counts, step, Alone(), Phases(CPU))
        adaptation.step = step


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_checkpoint_of_an_adaptation_restores_every_bit(optimizer: str) -> None:
    target = TargetConfig(steps=10, warmup_steps=0, optimizer=optimizer)
    prior = Prior("gaussian", PARTICLES, 10.0)
    whole, begun, resumed = (Adaptation(TunedPrompt.begin(PARTICLES[:2], 3), target) for _ in range(3))
    steps(whole, target, prior, 1, 6, poisoned=[2])
    steps(begun, target, prior, 1, 3, poisoned=[2])
    begun.keep_better([7.0, 8.0])
    whole.best, whole.best_score = begun.best, begun.best_score
    saved = {k: v.clone() for k, v in begun.tensors().items()}, begun.counters() | {"step": 3}
    resumed.restore(*saved)
    steps(resumed, target, prior, 4, 6)
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    assert (resumed.best_score, resumed.best_step, resumed.step) == ([7.0, 8.0], [3, 3], 6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_steps_as_torch_does_and_skips_alone(optimizer: str) -> None:
    """Two sound steps, one whose gradient is not finite in the second run, two more: torch skips that one too."""
    options = {"optimizer": optimizer, "weight_decay": 0.1, "schedule": "constant", "warmup_steps": 0, "steps": 9}
    target, prior = TargetConfig(**options), Prior("none", PARTICLES, 1.0)
    found = Adaptation(TunedPrompt.begin(PARTICLES[:2], 3), target)
    steps(found, target, prior, 1, 5, poisoned=[3])
    assert found.taken.tolist() == [5, 4]
    assert found.skipped.tolist() == [0, 1]
    for run, skipped in ((0, []), (1, [3])):
        prompt = ComposedPrompt.start_at(PARTICLES[run], 3)
        leaves = [tensor.requires_grad_() for tensor in prompt.tensors()]
        groups = [{"params": leaves[:1], "lr": target.lr_full}, {"params": leaves[1:], "lr": target.lr_low_rank}]
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        theirs = kind(groups, lr=1.0, weight_decay=0.1)
        for step in set(range(1, 6)) - set(skipped):
            gradient = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(step))[run]
            theirs.zero_grad()
            prompt.compose().backward(gradient)
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            theirs.step()
        for ours, expected in zip(found.tuned.of_run(run).tensors(), leaves, strict=True):
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_prior_that_is_not_finite_moves_nothing_either() -> None:
    """Of a sigma whose square float32 does not hold."""
    target, begin = TargetConfig(steps=10, warmup_steps=0), TunedPrompt.begin(PARTICLES[:2], 3)
    found = Adaptation(begin, target)
    before = [tensor.clone() for tensor in begin.tensors()]
    steps(found, target, Prior("gaussian", PARTICLES, 1e-30), 1, 2)
    assert found.skipped.tolist() == [2, 2]
    assert all(torch.equal(old, new) for old, new in zip(before, found.tuned.tensors(), strict=True))
    assert torch.isfinite(found.prior).all()
    steps(found, target, Prior("gaussian", PARTICLES, 1e-30), 3, 10)
    runs = [TargetRun("rte-0", Recipe(), []), TargetRun("rte-1", Recipe(), [])]
    _refuse_skipping(10, found, runs)
    steps(found, target, Prior("gaussian", PARTICLES, 1e-30), 11, 11)
    with pytest.raises(UserError, match=r"^step 11: run rte-0: gradients were not finite for 11 steps in a row; lower"):
        _refuse_skipping(11, found, runs)


@pytest.mark.parametrize(("most", "stops"), [(2, True), (3, False)])
def test_a_source_stage_in_this_loop_stops_as_its_recipe_says(most: int, stops: bool) -> None:
    source = SourceConfig(tasks=["sst2"], max_skipped=most)
    run = TargetRun("", Recipe(source=source), [], drawn_as=source)
    adaptation = Adaptation(TunedPrompt.begin(PARTICLES[:1], 3), TargetConfig(steps=10, warmup_steps=0))
    steps(adaptation, TargetConfig(steps=10, warmup_steps=0), Prior("none", PARTICLES, 1.0), 1, 3, poisoned=[1, 2, 3])
    if not stops:
        assert not _heed([(3, False, False)], adaptation, [run])
        return
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row; lower source\.lr"):
        _heed([(3, False, False)], adaptation, [run])


def test_a_run_of_several_is_the_run_alone() -> None:
    """Priors, clipping, optimizer: no run sees another."""
    target = TargetConfig(steps=10, warmup_steps=0, prior="mixture", sigma=3.0)
    together = Adaptation(TunedPrompt.begin(PARTICLES[:2], 3), target)
    own = torch.stack([PARTICLES, PARTICLES.flip(0)])  # of each run its own, as where each begins from its vocabulary
    steps(together, target, Prior("mixture", own, 3.0), 1, 4)
    alone = Adaptation(TunedPrompt.begin(PARTICLES[1:2], 3), target)
    steps(alone, target, Prior("mixture", own[1:], 3.0), 1, 4)
    for name, value in alone.tensors().items():
        torch.testing.assert_close(together.tensors()[name][1:], value)


def test_an_update_reads_nothing_back() -> None:
    """Fake tensors hold no values: an item(), a float() or a branch on one raises."""
    target = TargetConfig(steps=10, warmup_steps=0)
    with FakeTensorMode():
        adaptation = Adaptation(TunedPrompt.begin(torch.randn(2, 4, 32), 3), target)
        prior = Prior("mixture", torch.randn(2, 5, 4, 32), 3.0)
        update(
            target,
            adaptation,
            prior,
            [torch.randn(6, 4, 32)],
            torch.randn(6),
            torch.ones(2, 3),
            1,
            Alone(),
            Phases(CPU),
        )
        with pytest.raises(RuntimeError):  # so the above can fail
            adaptation.taken.tolist()
