"""The step's gradient: the definition, whatever the micro-batches."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bmtpt_ds.data.tokens import Batch, TokenRow, collate
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.errors import UserError
from bmtpt_ds.flags import Flags, LateFlags
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.methods.fine_tuning import free_weights
from bmtpt_ds.methods.weights import TunedWeights
from bmtpt_ds.model.backbone import checkpoint_activations
from bmtpt_ds.model.packed_pass import PackedPasses
from bmtpt_ds.phases import Phases
from bmtpt_ds.stopping import StopSignal
from tests.one_step import gradient_of_rows

CPU = torch.device("cpu")
ROWS = [TokenRow([5, 6, 7, 1], [40, 1]), TokenRow([8, 1], [41, 1]), TokenRow([9, 10, 11, 12, 13, 14, 1], [42, 43, 1])]


def gradient_of(loaded, prompts: torch.Tensor, max_tokens: int):
    return gradient_of_rows(GradientPass(loaded, 0, max_tokens, 0, Phases(CPU)), prompts, ROWS)


def by_definition(loaded, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each particle's loss: the mean over rows, each row alone in the batch."""
    theta = prompts.clone().requires_grad_()
    losses = []
    for particle in theta:
        of_rows = []
        for row in ROWS:
            of_rows.append(loaded.backbone.row_losses(particle[None], collate([[row]], 0).on(CPU))[0])
        losses.append(torch.stack(of_rows).mean())
    losses = torch.stack(losses)
    losses.sum().backward()
    return theta.grad, losses.detach()


@pytest.mark.parametrize("max_tokens", [10**9, 60, 1])
def test_gradient_and_losses_are_the_definitions(loaded, max_tokens: int) -> None:
    prompts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    expected_gradient, expected_losses = by_definition(loaded, prompts)
    found = gradient_of(loaded, prompts, max_tokens)
    torch.testing.assert_close(found.gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.losses, expected_losses)
    assert found.finite
    assert not found.stop


def test_no_weight_gets_a_gradient(loaded) -> None:
    prompts = torch.randn(3, 5, 32)
    gradient_of(loaded, prompts, 60)
    assert all(weight.grad is None for weight in loaded.backbone.parameters())
    thawed = copy.deepcopy(loaded.backbone)
    thawed.decoder.block[0].layer[0].SelfAttention.o.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="requires or got a gradient"):
        gradient_of(replace(loaded, backbone=thawed), prompts, 60)


class ShortMemory:
    """A backbone on a device that holds no more than `rows` rows at a time."""

    def __init__(self, backbone, rows: int):
        self._backbone, self._rows, self.refused = backbone, rows, 0

    def __getattr__(self, name: str):
        return getattr(self._backbone, name)

    def row_losses(self, prompts: torch.Tensor, buckets: list[Batch]) -> torch.Tensor:
        if len(prompts) > self._rows:
            self.refused += 1
            raise torch.OutOfMemoryError
        return self._backbone.row_losses(prompts, buckets)


def test_out_of_memory_halves_the_micro_batch_and_changes_no_gradient(loaded) -> None:
    prompts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    short = ShortMemory(loaded.backbone, rows=2)
    gradient_pass = GradientPass(replace(loaded, backbone=short), 0, 400, 0, Phases(CPU))
    found = gradient_of_rows(gradient_pass, prompts, ROWS)
    torch.testing.assert_close(found.gradient, by_definition(loaded, prompts)[0], rtol=1e-4, atol=1e-6)
    assert short.refused > 0
    refused = short.refused
    gradient_of_rows(gradient_pass, prompts, ROWS, 2)
    assert short.refused == refused  # learned once


def test_rows_that_fit_alone_are_read_alone(loaded) -> None:
    """Though half of the tokens are fewer than the longest row has."""
    prompts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    short = ShortMemory(loaded.backbone, rows=1)
    found = gradient_of_rows(GradientPass(replace(loaded, backbone=short), 0, 28, 0, Phases(CPU)), prompts, ROWS)
    torch.testing.assert_close(found.gradient, by_definition(loaded, prompts)[0], rtol=1e-4, atol=1e-6)
    assert short.refused == 1


def test_giving_graphs_back_is_tried_once(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are captured anew and memory runs out again, it is for the rows."""
    prompts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(PackedPasses, "forget", lambda _: True)
    short = ShortMemory(loaded.backbone, rows=2)
    gradient_pass = GradientPass(replace(loaded, backbone=short), 0, 400, 0, Phases(CPU))
    found = gradient_of_rows(gradient_pass, prompts, ROWS)
    torch.testing.assert_close(found.gradient, by_definition(loaded, prompts)[0], rtol=1e-4, atol=1e-6)
    assert short.refused > 0
    assert short.refused % 2 == 0 and short.refused <= 6  # twice of each size


def test_a_backward_pass_that_broke_off_leaves_nothing_in_the_weights(loaded) -> None:
    model = replace(loaded, backbone=copy.deepcopy(loaded.backbone))
    places = free_weights(model.backbone)
    values = {name: place.detach().clone()[None] for name, place in places.items()}
    through = TunedWeights(places, values, 1, 32, 0.1).through()
    gradient_pass, first = GradientPass(model, 0, 400, 0, Phases(CPU)), model.backbone.encoder.block[0]
    work, failures = gradient_pass.prepare(StepRows.evenly(ROWS), 1, 0), [1]
    right = gradient_pass(through, work, 1, StopSignal())

    def short_of_memory(_: torch.Tensor) -> None:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError

    first.layer[0].SelfAttention.q.weight.register_hook(short_of_memory)
    found = gradient_pass(through, work, 2, StopSignal())
    assert not failures
    for one, other in zip(found.gradients, right.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_out_of_memory_with_a_single_row_says_what_helps(loaded) -> None:
    short = ShortMemory(loaded.backbone, rows=0)
    with pytest.raises(UserError, match="activation_checkpointing"):
        gradient_of_rows(
            GradientPass(replace(loaded, backbone=short), 0, 400, 0, Phases(CPU)), torch.zeros(1, 5, 32), ROWS
        )


def test_other_errors_pass(loaded) -> None:
    with pytest.raises(RuntimeError, match="size"):  # a prompt of another width
        gradient_of(loaded, torch.zeros(1, 5, 16), 10**9)


def test_non_finite_prompts_are_seen(loaded) -> None:
    prompts = torch.zeros(2, 5, 32)
    prompts[1, 0, 0] = torch.nan
    assert not gradient_of(loaded, prompts, 10**9).finite


def test_dropout_is_drawn_anew_each_step_and_again_the_same_on_resume(untied_model) -> None:
    from bmtpt_ds.config import ModelConfig, deepspeed_json
    from bmtpt_ds.parallel import Ranks, load_backbone

    config = ModelConfig(name_or_path=str(untied_model), dropout=0.2)
    model = load_backbone(Ranks(timeout=60), config, deepspeed_json.load("resident"))
    model.backbone.train(model.backbone.train_while_tuning)
    prompts = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    gradients = [
        gradient_of_rows(GradientPass(model, 0, 10**9, 0, Phases(CPU)), prompts, ROWS, s).gradient for s in (1, 2, 1)
    ]
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_read_back_by_the_host(loaded, checkpointing):
    """Fake tensors hold no values: an item(), a float() or a branch on one raises, in our code and in transformers'."""
    backbone = copy.deepcopy(loaded.backbone)
    if checkpointing:
        checkpoint_activations(backbone)
    backbone.train(backbone.train_while_tuning)
    gradient_pass = GradientPass(replace(loaded, backbone=backbone), 0, 64, 0, Phases(CPU))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = gradient_of_rows(gradient_pass, torch.randn(3, 5, 32), ROWS)
        assert found.gradient.shape == (3, 5, 32)
        with pytest.raises(RuntimeError):  # so the above can fail: this is what waits
            found.flags.read()


def read(late: LateFlags, step: int, *, finite: bool = True, stop: bool = False, now: bool = False) -> list[tuple]:
    return list(late.read(step, Flags(torch.tensor(finite), torch.tensor(float(stop))), now=now))


def test_on_a_cpu_flags_are_read_at_once():
    late = LateFlags(CPU)
    assert read(late, 1) == [(1, True, False)]
    assert read(late, 2, finite=False) == [(2, False, False)]
    assert read(late, 3, stop=True) == [(3, True, True)]


def test_on_a_gpu_flags_are_read_a_step_late():
    late = LateFlags(torch.device("cuda"))
    assert read(late, 1, finite=False) == []
    assert read(late, 2) == [(1, False, False)]
    assert read(late, 3) == [(2, True, False)]
    # where the host waits anyway, for a line of the log or a checkpoint, nothing is left open
    assert read(late, 4, now=True) == [(3, True, False), (4, True, False)]
    assert read(late, 5) == []
    # a wish is heard a step late, and what the step after it was is known too before the checkpoint is written
    assert read(late, 6, stop=True) == [(5, True, False)]
    assert read(late, 7, finite=False) == [(6, True, True), (7, False, False)]
    assert read(late, 8) == []


@pytest.mark.parametrize("short_rank", [0, 1])
def test_a_rank_that_runs_out_of_memory_leaves_the_others_shares_alone(loaded, short_rank: int) -> None:
    """Resident ranks may halve their passes on their own: what each was dealt stays what it was."""
    prompts = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(3, 5, 32)
    for rank in (0, 1):
        short = ShortMemory(loaded.backbone, rows=2 if rank == short_rank else 100)
        gradient_pass = GradientPass(replace(loaded, backbone=short), 0, 150, 0, Phases(CPU), OneOfTwo(rank))
        for step in (1, 2):  # the second begins with passes that fit
            found = gradient_of_rows(gradient_pass, prompts, ROWS, step).gradient
        total += found
        assert bool(short.refused) == (rank == short_rank)
    torch.testing.assert_close(total, by_definition(loaded, prompts)[0], rtol=1e-4, atol=1e-6)


class OneOfTwo:
    """The place of a rank in a job of two, which adds nothing up."""

    data_ranks, particle_rank = 2, 0

    def __init__(self, data_rank: int):
        self.data_rank = data_rank

    def block(self, prompts: int) -> range:
        return range(prompts)

    def blocks(self, prompts: int) -> list[range]:
        return [range(prompts)]

    def combine(self, own: torch.Tensor) -> torch.Tensor:
        return own[None]
