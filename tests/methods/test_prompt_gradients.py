"""What is trained of ATTEMPT and MPT moves along autograd's gradient of the equation over all rows at once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bmtpt_ds.adaptation.tuned import Tuned, TunedPrompt
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.methods.attempt import TunedAttention
from bmtpt_ds.methods.mpt import TaughtPrompt
from tests.methods.prompts import (
    PROMPT_OF,
    ROWS,
    attentive_prompt,
    drawn,
    gradient_of,
    in_float64,
    plain_loss,
    sgd,
    step,
    taught_loss,
)

Leaves = dict[str, torch.Tensor]
SOURCES, TEACHERS = drawn(3, 5, 32, seed=8), drawn(4, 5, 32, seed=9)
TEMPERATURE, WEIGHT = 10.0, 0.7
RATES = {"own": 2.0, "full": 2.0, "a": 0.5, "b": 0.5, "down": 0.25, "up": 0.25, "scale": 0.25, "shift": 0.25}
TARGET = sgd(lr_full=2.0, lr_low_rank=0.5)


def attentive(runs: int = 2) -> TunedAttention:
    shapes = ((32, 4), (4, 32), (32,), (32,))
    attention = [drawn(runs, *shape, seed=i) * shape[0] ** -0.5 for i, shape in enumerate(shapes)]
    attention[2] += 1
    return TunedAttention(drawn(runs, 2, 5, 32, seed=7), attention, SOURCES, TEMPERATURE, RATES["down"])


def composed(runs: int, tasks: int) -> TunedPrompt:
    parts = [drawn(runs, tasks, size, seed=size) * 0.3 + 1 for size in (5, 32)]
    return TunedPrompt(drawn(runs, 5, 32, seed=6), *parts)


def taught() -> TaughtPrompt:
    """Of four tasks."""
    return TaughtPrompt(composed(1, 4), TEACHERS, WEIGHT)


def attentive_row(model, leaves: Leaves, row: TokenRow, run: int, task: int) -> torch.Tensor:
    attention = [leaves[name][run] for name in ("down", "up", "scale", "shift")]
    text = model.shared(torch.tensor(row.source))
    prompt = attentive_prompt(text, leaves["own"][run, task], SOURCES.double(), attention, TEMPERATURE)
    return plain_loss(model, prompt, row)


def composed_prompt(leaves: Leaves, run: int, task: int) -> torch.Tensor:
    return leaves["full"][run] * torch.outer(leaves["a"][run, task], leaves["b"][run, task])


def composed_row(model, leaves: Leaves, row: TokenRow, run: int, task: int) -> torch.Tensor:
    return plain_loss(model, composed_prompt(leaves, run, task), row)


def taught_row(model, leaves: Leaves, row: TokenRow, run: int, task: int) -> torch.Tensor:
    return taught_loss(model, composed_prompt(leaves, run, task), TEACHERS[task].double(), row, WEIGHT)


CASES = {
    "attempt": (attentive, attentive_row),
    "mpt target": (lambda: composed(2, 2), composed_row),
    "mpt source": (taught, taught_row),
}


def equation(folder: Path, tuned: Tuned, loss_of_row, prompt_of: Sequence[int]) -> tuple[torch.Tensor, Leaves]:
    """Each run's mean row loss [R] in float64, and the gradients of their sum by name."""
    model = in_float64(folder)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in tuned.trained.items()}
    of_runs = [[] for _ in range(tuned.runs)]
    for row, number in zip(ROWS, prompt_of, strict=True):
        run, task = divmod(number, tuned.tasks)
        of_runs[run].append(loss_of_row(model, leaves, row, run, task))
    losses = torch.stack([sum(of_run) / len(of_run) for of_run in of_runs])
    return losses, dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_step_follows_the_equations_gradient(loaded, untied_model: Path, case: str) -> None:
    make, loss_of_row = CASES[case]
    tuned = make()
    before = {name: tensor.clone() for name, tensor in tuned.trained.items()}
    losses, wanted = equation(untied_model, tuned, loss_of_row, PROMPT_OF)
    found = gradient_of(loaded, tuned, ROWS, PROMPT_OF)
    torch.testing.assert_close(found.losses.view(tuned.runs, -1).sum(dim=1), losses.float(), rtol=1e-5, atol=1e-5)
    gradients = tuned.pull_back(found.gradients)
    assert gradients.keys() == wanted.keys() == before.keys()
    step(loaded, tuned, TARGET, found, PROMPT_OF)
    for name, gradient in wanted.items():
        within = {
            "rtol": 1e-4,
            "atol": 1e-5 * gradient.abs().max().item(),
            "msg": lambda text, of=name: f"{of}: {text}",
        }
        assert gradient.abs().max() > 1e-3  # of float32's noise 1e-7
        torch.testing.assert_close(gradients[name].double(), gradient, **within)
        moved = (before[name] - tuned.trained[name]).double() / RATES[name]
        torch.testing.assert_close(moved, gradient, **(within | {"atol": within["atol"] + 1e-6}))


@pytest.mark.parametrize("case", CASES)
def test_a_task_without_rows_has_no_gradient_of_its_own(loaded, case: str) -> None:
    tuned = CASES[case][0]()
    prompt_of = [0, 2, 2, 0, 2, 2]
    gradients = tuned.pull_back(gradient_of(loaded, tuned, ROWS, prompt_of).gradients)
    for name in gradients.keys() & {"own", "a", "b"}:
        of_prompts = gradients[name].flatten(0, 1)
        assert [bool(of_prompt.any()) for of_prompt in of_prompts] == [True, False, True, False]


@pytest.mark.parametrize("case", ["attempt", "mpt target"])
def test_two_runs_side_by_side_are_each_alone(loaded, case: str) -> None:
    both = CASES[case][0]()
    alone = [one_run(both, run) for run in range(2)]
    step(loaded, both, TARGET, gradient_of(loaded, both, ROWS, PROMPT_OF), PROMPT_OF)
    for run, tuned in enumerate(alone):
        mine = [(row, n - 2 * run) for row, n in zip(ROWS, PROMPT_OF, strict=True) if n // 2 == run]
        rows, prompt_of = zip(*mine, strict=True)
        before = {name: tensor.clone() for name, tensor in tuned.trained.items()}
        step(loaded, tuned, TARGET, gradient_of(loaded, tuned, rows, prompt_of), prompt_of)
        for name, tensor in tuned.trained.items():
            torch.testing.assert_close(both.trained[name][run], tensor[0], rtol=1e-5, atol=1e-5)
            assert (tensor - before[name]).abs().max() > 1e-3


def one_run(both: Tuned, run: int) -> Tuned:
    parts = [tensor[run : run + 1].clone() for tensor in both.trained.values()]
    if isinstance(both, TunedAttention):
        return TunedAttention(parts[0], parts[1:], SOURCES, TEMPERATURE, both.own_rates["lr_attention"])
    return TunedPrompt(*parts)
