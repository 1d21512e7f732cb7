"""What the target stage trains. R runs side by side, N tasks in each; L prompt length, H hidden size.

The stage's loop knows nothing of prompts: it asks for the tensors that are trained, for what rows are read through, and
for the gradients of the first from those of the second.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from bmtpt_ds.losses import Prompts, Through
from bmtpt_ds.model.backbone import RowPrompts
from bmtpt_ds.model.prompts import ComposedPrompt


class Tuned(ABC):
    """Named tensors, of every run its own: R in front of each shape. The same on all ranks."""

    runs: int  # R
    tasks: int  # N
    length: int  # L
    own_rates: Mapping[str, float] = {}  # learning rates beside the recipe's lr_full and lr_low_rank, by name

    @property
    @abstractmethod
    def trained(self) -> dict[str, torch.Tensor]:
        """[R, ...] in float32; written to in place."""

    @abstractmethod
    def rate_of(self, name: str) -> str:
        """Which learning rate a tensor has."""

    @abstractmethod
    def through(self) -> Through:
        """What rows are read through, as the tensors stand: prompt r * N + k is that of run r and its task k."""

    @abstractmethod
    def pull_back(self, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the trained tensors from those of the leaves of `through()`."""

    @abstractmethod
    def answering(self, run: int, task: int) -> torch.Tensor | RowPrompts:
        """The prompt [L, H] of a task that answers rows."""

    @abstractmethod
    def clone(self) -> "Tuned":
        """A copy with tensors of its own."""

    @abstractmethod
    def stored(self, run: int, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the file of a run's outcome holds; `tasks` in the order of the prompts."""

    @abstractmethod
    def describe(self) -> str:
        """What a run trains, in a few words for a person."""

    def composed(self) -> torch.Tensor | None:
        """The prompts [R, N, L, H], where they are the same for all rows of a task."""
        return None

    @property
    def rates(self) -> list[str]:
        """The learning rates that its tensors have, each once."""
        return list(dict.fromkeys(map(self.rate_of, self.trained)))

    def parameters(self) -> int:
        """Trained numbers of a run."""
        return sum(tensor[0].numel() for tensor in self.trained.values())


class TunedPrompt(ComposedPrompt, Tuned):
    """W * (a b^T) of the paper's section 4.2.2; or W alone, a and b frozen at ones, which is prompt tuning."""

    def __init__(self, full: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, low_rank: bool = True):
        """
        Args:
            full: W [R, L, H], shared by a run's tasks.
            a, b: [R, N, L] and [R, N, H].
            low_rank: whether a and b are trained.
        """
        super().__init__(full, a, b)
        self.low_rank = low_rank
        self.runs, self.tasks, self.length = a.shape

    @classmethod
    def begin(cls, centres: torch.Tensor, tasks: int, *, low_rank: bool = True) -> "TunedPrompt":
        """Every run's W at its centre of `centres` [R, L, H], a and b at ones."""
        return cls(*ComposedPrompt.start_at(centres, tasks).tensors(), low_rank=low_rank)

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return {"full": self.full, "a": self.a, "b": self.b} if self.low_rank else {"full": self.full}

    def rate_of(self, name: str) -> str:
        return "lr_full" if name == "full" else "lr_low_rank"

    def through(self) -> Prompts:
        return Prompts(self.compose().flatten(0, 1))

    def pull_back(self, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        (of_prompts,) = gradients
        with torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.trained.items()}
            composed = ComposedPrompt(**{"a": self.a, "b": self.b, **leaves}).compose()
            found = torch.autograd.grad(composed, list(leaves.values()), of_prompts.view_as(composed))
        return dict(zip(leaves, found, strict=True))

    def answering(self, run: int, task: int) -> torch.Tensor:
        return self.composed()[run, task]

    def clone(self) -> "TunedPrompt":
        return TunedPrompt(*(tensor.clone() for tensor in self.tensors()), low_rank=self.low_rank)

    def stored(self, run: int, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        return self.of_run(run).named(tasks)

    def composed(self) -> torch.Tensor:
        return self.compose()

    def describe(self) -> str:
        hidden = self.full.shape[-1]
        shape = f"{self.length} x {hidden}"
        what = f"{self.tasks} prompts of {shape} with one W" if self.tasks > 1 else f"a prompt of {shape}"
        return f"{what}, {self.parameters() / self.tasks:,.0f} parameters{' a task' * (self.tasks > 1)}"
