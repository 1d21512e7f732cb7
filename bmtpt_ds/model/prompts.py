"""Soft prompts: how particles begin, and how a target prompt is composed (paper, sections 4.2.2 and 4.3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bmtpt_ds.data.order import stream
from bmtpt_ds.model_folder import FIRST_TEXT_TOKEN, common_tokens


def vocabulary_ids(count: int, length: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Token ids [count, length] whose embeddings a prompt starts from, each prompt's without replacement.

    Raises:
        UserError: a prompt longer than there are common tokens.
    """
    common = common_tokens(vocab_size, length)
    draws = [stream("prompt", seed, i).permutation(common)[:length] for i in range(count)]
    return torch.stack([torch.from_numpy(draw) for draw in draws]) + FIRST_TEXT_TOKEN


def initial_prompts(
    init: str,
    count: int,
    length: int,
    vocab_size: int,
    seed: int,
    rows_of: Callable[[torch.Tensor], torch.Tensor],
    spread: float = 0.1,
) -> torch.Tensor:
    """Prompts [count, L, H] in float32 that a stage begins with.

    Args:
        init: `vocab`, embeddings of random common tokens (section 4.3.1, after Lester et al. 2021); `normal`,
            Gaussian noise of those embeddings' standard deviation (they are large: 13.5 in flan-t5-small); `shared`,
            one draw of them for all, to which several prompts add noise of `spread` times that: vocabulary rows of
            different draws are as good as orthogonal, and the mean of five such prompts is near none of them.
        rows_of: token ids [N] -> their embeddings [N, H], asked of the loaded backbone.
    """
    ids = vocabulary_ids(count, length, vocab_size, seed)
    rows = rows_of(ids.flatten()).float().view(count, length, -1)
    if init == "vocab" or (init == "shared" and count == 1):
        return rows
    noise = torch.from_numpy(stream("normal prompt", seed).standard_normal(rows.shape)).float()
    noise = noise.to(rows.device) * rows.std()
    return rows[:1] + spread * noise if init == "shared" else noise


@dataclass
class ComposedPrompt:
    """The prompts W * (a b^T) of N target tasks (section 4.2.2): full rank for what they share, rank one for each.

    Of R runs side by side, each with its own W: R in front of every shape.
    """

    full: torch.Tensor  # W [L, H]
    a: torch.Tensor  # [N, L]
    b: torch.Tensor  # [N, H]

    @classmethod
    def start_at(cls, centre: torch.Tensor, tasks: int) -> "ComposedPrompt":
        """W at `centre` [L, H], a and b at ones: every task's composition equals `centre`."""
        *runs, length, hidden = centre.shape
        return cls(centre.clone(), centre.new_ones(*runs, tasks, length), centre.new_ones(*runs, tasks, hidden))

    def compose(self) -> torch.Tensor:
        """The prompts [N, L, H] that the backbone reads, each before the rows of its task."""
        return self.full[..., None, :, :] * (self.a[..., :, None] * self.b[..., None, :])

    def of_run(self, run: int) -> "ComposedPrompt":
        """One of several runs' prompts."""
        return ComposedPrompt(*(tensor[run] for tensor in self.tensors()))

    def tensors(self) -> list[torch.Tensor]:
        return [self.full, self.a, self.b]

    def named(self, tasks: Sequence[str]) -> dict[str, torch.Tensor]:
        """As a run's file holds them; `tasks` in the order of the prompts."""
        own = {f"{task}.{name}": getattr(self, name)[k] for k, task in enumerate(tasks) for name in ("a", "b")}
        return {"full": self.full} | own
