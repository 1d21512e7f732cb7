"""ATTEMPT (Asai et al. 2022): a prompt of the task's own and frozen source prompts, mixed by attention for each row.

    P(x) = P_own + sum_j a_j(x) P_j,    j over the K source prompts and P_own
    a(x) = softmax_j( max_l P_j[l] . g(x) / tau ),    g(x) = LayerNorm(W_up^T silu(W_down^T max_s x[s]))

x[s] are the embedded tokens of the row's text (padding left out), W_down [H, r] and W_up [r, H] have no bias, tau is e
times H (2087 at T5-base). P_own begins at vocabulary rows. Trained are P_own at `target.lr_full` and the attention at
`attempt.lr` (0.1, as their multi-task configuration has it; none is given for a single task); the source prompts are
those of SPoT. L H + 2 H r + 2 H numbers: 232K at T5-base with L = 100 and r = 100. N tasks at once share the attention:
96K a task for the eight of GLUE.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import layer_norm, silu

from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.config.methods import AttemptConfig
from bmtpt_ds.data.order import stream
from bmtpt_ds.data.tokens import Batch
from bmtpt_ds.errors import UserError
from bmtpt_ds.losses import Through, of_rows
from bmtpt_ds.methods.job import AdaptJob, Begun, without_prior
from bmtpt_ds.methods.source_prompts import learn
from bmtpt_ds.model.backbone import Backbone
from bmtpt_ds.session import Session

__all__ = ["attend", "begin", "learn", "reader"]

_ATTENTION = ("down", "up", "scale", "shift")


def attend(
    text: torch.Tensor, own: torch.Tensor, sources: torch.Tensor, attention: Sequence[torch.Tensor], temperature: float
) -> torch.Tensor:
    """P(x) of rows, [n, L, H].

    Args:
        text: max_s x[s], [n, H].
        own: P_own of each row, [n, L, H].
        sources: [K, L, H].
        attention: W_down [H, r], W_up [r, H], and of the norm scale [H] and shift [H].
    """
    down, up, scale, shift = attention
    query = layer_norm(silu(text @ down) @ up, scale.shape, scale, shift)
    keys = sources.amax(dim=1)
    scores = torch.cat([query @ keys.T, (query * own.amax(dim=1)).sum(dim=1, keepdim=True)], dim=1) / temperature
    shares = scores.softmax(dim=1)
    return own + torch.einsum("nk,klh->nlh", shares[:, :-1], sources) + shares[:, -1, None, None] * own


@dataclass(frozen=True)
class AttentivePrompts:
    """The prompts of rows, by what the rows say: a `RowPrompts` of the backbone."""

    own: torch.Tensor  # [R, N, L, H]
    attention: Sequence[torch.Tensor]  # R in front of each
    sources: torch.Tensor  # [K, L, H]
    temperature: float
    numbers: Sequence[int] | None = None  # r * N + k of each row; None: all of them the first

    @property
    def length(self) -> int:
        return self.sources.shape[1]

    def __call__(self, texts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
        text = torch.cat([_greatest(*of_bucket) for of_bucket in zip(texts, masks, strict=True)]).to(self.own.dtype)
        numbers = [0] * len(text) if self.numbers is None else self.numbers
        prompts, tasks = self.own.flatten(0, 1), self.own.shape[1]
        runs = [number // tasks for number in numbers]
        order = sorted(range(len(runs)), key=runs.__getitem__)
        made = []
        for run in sorted(set(runs)):
            rows = [i for i in order if runs[i] == run]
            own = of_rows(prompts, [numbers[i] for i in rows])
            attention = [tensor[run] for tensor in self.attention]
            made += attend(text[rows], own, self.sources, attention, self.temperature).unbind(0)
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.stack([made[i] for i in back])


def _greatest(text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The greatest value of each dimension over a row's tokens, [n, H] of [n, S, H]."""
    if mask is not None:
        text = text.masked_fill(mask[..., None] == 0, -torch.inf)
    return text.amax(dim=1)


@dataclass(frozen=True)
class _Attentive(Through):
    prompts: AttentivePrompts

    def __len__(self) -> int:
        return self.prompts.own[..., 0, 0].numel()

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.prompts.own, *self.prompts.attention]

    def row_losses(
        self, backbone: Backbone, leaves: Sequence[torch.Tensor], numbers: Sequence[int], batches: Sequence[Batch]
    ) -> torch.Tensor:
        own, *attention = leaves
        prompts = AttentivePrompts(own, attention, self.prompts.sources, self.prompts.temperature, numbers)
        return backbone.row_losses(prompts, batches)


class TunedAttention(Tuned):
    """P_own of each task and the attention, shared by a run's tasks."""

    def __init__(
        self, own: torch.Tensor, attention: Sequence[torch.Tensor], sources: torch.Tensor, temperature: float, lr: float
    ):
        """
        Args:
            own, attention, sources, temperature: as of `AttentivePrompts`.
            lr: of the attention.
        """
        self.runs, self.tasks, self.length = own.shape[:3]
        self.own, self.attention, self.sources, self.temperature = own, list(attention), sources, temperature
        self.own_rates = {"lr_attention": lr}

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return {"own": self.own, **dict(zip(_ATTENTION, self.attention, strict=True))}

    def rate_of(self, name: str) -> str:
        return "lr_full" if name == "own" else "lr_attention"

    def through(self) -> _Attentive:
        return _Attentive(AttentivePrompts(self.own, self.attention, self.sources, self.temperature))

    def pull_back(self, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.trained, gradients, strict=True))

    def answering(self, run: int, task: int) -> AttentivePrompts:
        own = self.own[run : run + 1, task : task + 1]
        return AttentivePrompts(own, [t[run : run + 1] for t in self.attention], self.sources, self.temperature)

    def clone(self) -> "TunedAttention":
        copies = [tensor.clone() for tensor in self.trained.values()]
        return TunedAttention(copies[0], copies[1:], self.sources, self.temperature, self.own_rates["lr_attention"])

    def stored(self, run: int, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        own = {f"{task}.own": self.own[run, k] for k, task in enumerate(tasks)}
        of_attention = {name: tensor[run] for name, tensor in zip(_ATTENTION, self.attention, strict=True)}
        return own | of_attention | {"sources": self.sources}

    def describe(self) -> str:
        what = f"{self.tasks} prompts" if self.tasks > 1 else "a prompt"
        shape = " x ".join(map(str, self.own.shape[2:]))
        each = f"{self.parameters() / self.tasks:,.0f} parameters{' a task' * (self.tasks > 1)}"
        return f"{what} of {shape} and attention over {len(self.sources)} source prompts, {each}"


def temperature_of(attempt: AttemptConfig, hidden: int) -> float:
    """tau."""
    return math.e * hidden if attempt.temperature == "auto" else float(attempt.temperature)


def initial_attention(hidden: int, bottleneck: int, seed: int) -> list[torch.Tensor]:
    """W_down, W_up, scale and shift of a run: U(-1/sqrt(fan in), 1/sqrt(fan in)) as torch's linear layers begin."""
    draw = stream("attention", seed)
    shapes = ((hidden, bottleneck), (bottleneck, hidden))
    drawn = [torch.from_numpy(draw.uniform(-(shape[0] ** -0.5), shape[0] ** -0.5, shape)).float() for shape in shapes]
    return [*drawn, torch.ones(hidden), torch.zeros(hidden)]


def begin(job: AdaptJob) -> Begun:
    sources, attempt = job.source_tensor("particles"), job.session.recipe.attempt
    own = job.vocabulary_prompts()[:, None].repeat(1, job.tasks, 1, 1)
    hidden = sources.shape[-1]
    of_runs = [initial_attention(hidden, attempt.bottleneck, run.seed) for run in job.runs]
    attention = [torch.stack(tensors).to(sources.device) for tensors in zip(*of_runs, strict=True)]
    tuned = TunedAttention(own, attention, sources, temperature_of(attempt, hidden), attempt.lr)
    return without_prior(tuned)


def reader(stored: Stored, session: Session) -> Callable[[str], AttentivePrompts]:
    """What gives each task's prompts of a finished run."""
    tensors = {name: tensor.to(session.ranks.device) for name, tensor in stored.tensors.items()}
    attempt = AttemptConfig(**stored.state["recipe"]["attempt"])

    def read(task: str) -> AttentivePrompts:
        if f"{task}.own" not in tensors:
            raise UserError(f"{stored.path}: its prompts are for {', '.join(stored.state['tasks'])} and not for {task}")
        attention = [tensors[name][None] for name in _ATTENTION]
        temperature = temperature_of(attempt, session.model.hidden_size)
        return AttentivePrompts(tensors[f"{task}.own"][None, None], attention, tensors["sources"], temperature)

    return read
