"""What the tests of the prompt methods share: jobs to begin, rows, and the equations of one row by transformers' T5."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import T5ForConditionalGeneration

from bmtpt_ds.adaptation.prior import Prior
from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.config import Recipe, TargetConfig
from bmtpt_ds.data.splits import Splits, TaskSplits
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, StepGradient
from bmtpt_ds.methods.job import AdaptJob
from bmtpt_ds.phases import Phases
from bmtpt_ds.session import Session
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.target import update
from bmtpt_ds.tasks import TASKS

CPU = torch.device("cpu")
NO_PRIOR = Prior("none", torch.zeros(1, 0, 0), 1.0)
ROWS = [
    TokenRow([5, 6, 7, 1], [40, 1]),
    TokenRow([8, 1], [41, 1]),
    TokenRow([9, 10, 11, 12, 13, 14, 1], [42, 43, 1]),
    TokenRow([15, 16, 17, 18, 1], [44, 1]),
    TokenRow([19, 20, 1], [45, 46, 47, 1]),
    TokenRow([21, 22, 23, 24, 25, 1], [48, 1]),
]
PROMPT_OF = [0, 3, 1, 0, 2, 3]  # of two runs of two tasks: three rows in each run


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def t5_base() -> SimpleNamespace:
    """In the place of a loaded T5-base: its sizes."""
    ranks = SimpleNamespace(device=CPU, first_does=lambda what: what())
    config = SimpleNamespace(vocab_size=32_128, d_model=768)
    return SimpleNamespace(
        backbone=SimpleNamespace(config=config),
        embedding_rows=lambda ids: torch.ones(len(ids), 768),
        hidden_size=768,
        ranks=ranks,
    )


class Part(SimpleNamespace):
    """In the place of a run's directory."""

    def open(self) -> None:
        self.path.mkdir(exist_ok=True)

    def part(self, name: str) -> "Part":
        return Part(path=self.path / name)


def job(
    recipe: Recipe,
    model,
    source: dict[str, torch.Tensor] | None = None,
    names: Sequence[str] = (),
    *,
    tasks: int = 1,
    runs: int = 1,
    directory=None,
) -> AdaptJob:
    """A target stage to begin.

    Args:
        source: what the source stage left, of tasks of those names.
        runs: with seeds 0, 1, ...
    """
    rows = [TaskSplits(TASKS[name], Splits([{}] * 8, [], [])) for name in list(TASKS)[:tasks]]
    recipes = [recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})}) for seed in range(runs)]
    stored = None if source is None else Stored(Path("source"), source, {"tasks": list(names)})
    each = [TargetRun(f"seed-{seed}", of_run, rows) for seed, of_run in enumerate(recipes)]
    return AdaptJob(Session(recipe, model, None, StopSignal()), each, directory, stored)


def sgd(**settings) -> TargetConfig:
    plain = {"optimizer": "sgd", "clip_norm": None, "schedule": "constant", "warmup_steps": 0, "prior": "none"}
    return TargetConfig(**(plain | settings))


def gradient_of(loaded, tuned: Tuned, rows: Sequence[TokenRow], prompt_of: Sequence[int]) -> StepGradient:
    """Of each run's mean over its rows, in several micro-batches."""
    of_run = torch.bincount(torch.tensor(prompt_of) // tuned.tasks, minlength=tuned.runs).tolist()
    weights = [1 / of_run[number // tuned.tasks] for number in prompt_of]
    gradient_pass = GradientPass(loaded, 0, 40, 0, Phases(CPU))
    work = gradient_pass.prepare(StepRows(rows, weights, prompt_of), tuned.runs * tuned.tasks, tuned.length)
    assert len(rows) > len(work.passes) > 1
    return gradient_pass(tuned.through(), work, 1, StopSignal())


def step(loaded, tuned: Tuned, target: TargetConfig, found: StepGradient, prompt_of: Sequence[int]) -> None:
    """The target stage's step on `tuned`."""
    counts = torch.bincount(torch.tensor(prompt_of), minlength=tuned.runs * tuned.tasks).float()
    counts = counts.view(tuned.runs, tuned.tasks)
    adaptation = Adaptation(tuned, target)
    update(target, adaptation, NO_PRIOR, found.gradients, found.losses, counts, 1, loaded.ranks, Phases(CPU))


# --- equations of a single row, by transformers' own model -----------------------------------------------------------


def in_float64(folder: Path) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(folder).double().eval().requires_grad_(False)


def read_row(model: T5ForConditionalGeneration, prompt: torch.Tensor, row: TokenRow) -> tuple[torch.Tensor, ...]:
    """log p of each target token [T, V], last hidden states of the text [S, H] and of the target [T, H]."""
    embedded = model.shared(torch.tensor([row.source]))
    given = torch.cat([prompt[None], embedded], dim=1)
    out = model(inputs_embeds=given, labels=torch.tensor([row.target]), output_hidden_states=True)
    text = out.encoder_last_hidden_state[0, len(prompt) :]
    return out.logits[0].log_softmax(dim=-1), text, out.decoder_hidden_states[-1][0]


def plain_loss(model: T5ForConditionalGeneration, prompt: torch.Tensor, row: TokenRow) -> torch.Tensor:
    log_p, *_ = read_row(model, prompt, row)
    return -sum(log_p[t, token] for t, token in enumerate(row.target)) / len(row.target)


def apart(of_student: Sequence[torch.Tensor], of_teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """MPT's KL[teacher || student] + MSE of hidden states, of what `read_row` gives."""
    (student, text, target), (teacher, text_wanted, target_wanted) = of_student, of_teacher
    kl = 0
    for found, wanted in zip(student, teacher, strict=True):
        kl += sum(q.exp() * (q - p) for p, q in zip(found, wanted, strict=True)) / len(teacher)
    mse = sum(((h - wanted) ** 2).sum() / h.numel() for h, wanted in ((text, text_wanted), (target, target_wanted)))
    return kl + mse


def taught_loss(
    model: T5ForConditionalGeneration, prompt: torch.Tensor, teacher: torch.Tensor, row: TokenRow, weight: float
) -> torch.Tensor:
    """MPT's loss of a row."""
    distance = apart(read_row(model, prompt, row), read_row(model, teacher, row))
    return plain_loss(model, prompt, row) + weight * distance


def attentive_prompt(
    x: torch.Tensor,  # [S, H]
    own: torch.Tensor,  # [L, H]
    sources: Sequence[torch.Tensor],  # [L, H] each
    attention: Sequence[torch.Tensor],
    temperature: float,
) -> torch.Tensor:
    """ATTEMPT's P(x) of one row, prompt by prompt."""
    down, up, scale, shift = attention
    inner = down.T @ x.max(dim=0).values
    raw = up.T @ (inner / (1 + torch.exp(-inner)))
    mean = raw.sum() / len(raw)
    variance = ((raw - mean) ** 2).sum() / len(raw)
    query = scale * (raw - mean) / torch.sqrt(variance + 1e-5) + shift
    prompts = [*sources, own]
    powers = [torch.exp((prompt.max(dim=0).values * query).sum() / temperature) for prompt in prompts]
    mixed = own
    for prompt, power in zip(prompts, powers, strict=True):
        mixed = mixed + power / sum(powers) * prompt
    return mixed
