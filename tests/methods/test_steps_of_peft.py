"""Ten steps of the target stage's loop beside ten that PEFT and torch.optim.AdamW take from the same start."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import T5ForConditionalGeneration

from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.config import Recipe, TargetConfig
from bmtpt_ds.data.tokens import IGNORE, TokenRow, pad
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.methods import bmtpt, mpt, prompt_tuning
from bmtpt_ds.methods.job import Begun
from bmtpt_ds.phases import Phases
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.target import TargetSteps
from tests.methods.prompts import CPU, drawn, job
from tests.peft_adapters import multitask, peft, plain

STEPS, ROWS = 10, 6
TARGET = {
    "steps": STEPS,
    "schedule": "constant",
    "warmup_steps": 0,
    "clip_norm": None,
    "prior": "none",
    "lr_full": 0.03,
    "lr_low_rank": 0.02,
    "weight_decay": 0.1,
}
PARTS = {
    "sst2.a": drawn(5, seed=2),
    "cola.a": drawn(5, seed=3),
    "sst2.b": drawn(32, seed=4),
    "cola.b": drawn(32, seed=5),
}
Drawn = tuple[list[TokenRow], list[int]]


def recipe(method: str) -> Recipe:
    return Recipe(method=method, prompt={"length": 5}, target=TARGET)


def decomposed(loaded, tasks: int) -> Begun:
    source = {"shared": drawn(5, 32), **{name: 1 + part for name, part in PARTS.items()}}
    return mpt.begin(job(recipe("mpt"), loaded, source, ["sst2", "cola"], tasks=tasks))


def centred(loaded, tasks: int) -> Begun:
    return bmtpt.begin(job(recipe("bmtpt"), loaded, {"particles": drawn(3, 5, 32)}, ["sst2"], tasks=tasks))


def from_vocabulary(loaded, tasks: int) -> Begun:
    return prompt_tuning.begin(job(recipe("prompt_tuning"), loaded, tasks=tasks))


def rows_of(step: int, tasks: int) -> Drawn:
    """Rows of several lengths, and of which task each is; the same at every call."""
    draw = torch.Generator().manual_seed(step)

    def ids(least: int, most: int, first: int) -> list[int]:
        length = int(torch.randint(least, most, (), generator=draw))
        return [*torch.randint(first, 90, (length,), generator=draw).tolist(), 1]

    rows = [TokenRow(ids(1, 8, 5), ids(1, 4, 40)) for _ in range(ROWS)]
    return rows, torch.randint(tasks, (ROWS,), generator=draw).tolist()


def our_steps(loaded, begun: Begun, target: TargetConfig) -> list[float]:
    """The losses of the steps, each of several micro-batches."""
    tuned, passes = begun.tuned, []
    gradient_of = GradientPass(loaded, 0, 60, 0, Phases(CPU))

    def draw(step: int) -> tuple[StepRows, torch.Tensor]:
        rows, of_task = rows_of(step, tuned.tasks)
        passes.append(len(gradient_of.prepare(StepRows.evenly(rows, of_task), tuned.tasks, tuned.length).passes))
        return StepRows.evenly(rows, of_task), torch.bincount(torch.tensor(of_task), minlength=tuned.tasks)[
            None
        ].float()

    adaptation, stop = Adaptation(tuned, target), StopSignal()
    with TargetSteps(target, loaded, gradient_of, begun.prior, Phases(CPU), draw, stop, tuned.length) as next_step:
        losses = [next_step(adaptation).losses.sum().item() for _ in range(STEPS)]
    assert min(passes) > 1
    assert adaptation.taken.tolist() == [STEPS]
    return losses


def row_mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the rows' own means over their target tokens."""
    return torch.stack([cross_entropy(*row, ignore_index=IGNORE) for row in zip(logits, labels, strict=True)]).mean()


class Theirs:
    """PEFT's prompt in front of transformers' model."""

    def __init__(self, folder: Path, tuned: TunedPrompt):
        config = multitask(num_tasks=tuned.tasks) if tuned.low_rank else plain(num_transformer_submodules=1)
        base = T5ForConditionalGeneration.from_pretrained(folder)
        self.model, self.tasks, self.low_rank = peft.get_peft_model(base, config).eval(), tuned.tasks, tuned.low_rank
        encoder = self.model.prompt_encoder["default"]
        self.parts = {"full": encoder.embedding.weight}
        if tuned.low_rank:
            self.parts |= {"a": encoder.prefix_task_cols, "b": encoder.prefix_task_rows}
        for name, part in self.parts.items():
            part.data.copy_(tuned.trained[name].view(part.shape))
        assert {id(p) for p in self.model.parameters() if p.requires_grad} == {id(p) for p in self.parts.values()}

    def loss(self, rows: Sequence[TokenRow], of_task: Sequence[int]) -> torch.Tensor:
        sources, labels = pad([row.source for row in rows], 0), pad([row.target for row in rows], IGNORE)
        mask = pad([[1] * len(row.source) for row in rows], 0)
        assert mask.min() == 0
        which = {"task_ids": torch.tensor(of_task)} if self.low_rank else {}
        return row_mean(self.model(input_ids=sources, attention_mask=mask, labels=labels, **which).logits, labels)

    def steps(self, target: TargetConfig) -> list[float]:
        rates = {"full": target.lr_full, "a": target.lr_low_rank, "b": target.lr_low_rank}
        groups = [{"params": [part], "lr": rates[name]} for name, part in self.parts.items()]
        optimizer, losses = torch.optim.AdamW(groups, weight_decay=target.weight_decay), []
        for step in range(1, STEPS + 1):
            loss = self.loss(*rows_of(step, self.tasks))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("begin", [from_vocabulary, decomposed, centred])
def test_ten_steps_are_pefts(loaded, untied_model: Path, begin: Callable[..., Begun], tasks: int) -> None:
    begun, target = begin(loaded, tasks), recipe("bmtpt").target
    theirs = Theirs(untied_model, begun.tuned)
    start = {name: part.detach().clone() for name, part in theirs.parts.items()}
    losses, expected = our_steps(loaded, begun, target), theirs.steps(target)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert begun.tuned.trained.keys() == theirs.parts.keys()
    for name, part in theirs.parts.items():
        assert (part - start[name]).abs().mean() > 0.03
        torch.testing.assert_close(begun.tuned.trained[name].view(part.shape), part.detach(), rtol=1e-4, atol=1e-4)
    if tasks == 2 and begun.tuned.low_rank:
        assert not torch.allclose(*begun.tuned.composed()[0], atol=0.05)  # the tasks have gone their own ways
