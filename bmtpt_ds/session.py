"""What every command begins with: the job's ranks, the rows, the backbone, the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from bmtpt_ds import __version__, deepspeed_json
from bmtpt_ds.config import Recipe
from bmtpt_ds.data.splits import Splits, load_task
from bmtpt_ds.data.tokens import RowEncoder, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.prompts import initial_prompts
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import Task

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Session:
    """A command at work."""

    recipe: Recipe
    model: Sharded
    encoder: RowEncoder
    stop: StopSignal

    @property
    def ranks(self) -> Ranks:
        return self.model.ranks

    def initial_prompts(self, count: int) -> torch.Tensor:
        """`count` prompts [count, L, H] as the recipe begins them; all ranks must ask together."""
        prompt, vocab = self.recipe.prompt, self.model.backbone.config.vocab_size
        seed, rows_of = self.recipe.run.seed, self.model.embedding_rows
        return initial_prompts(prompt.init, count, prompt.length, vocab, seed, rows_of)

    def identity(self) -> dict:
        """What a file of prompts belongs to, and how it came about."""
        return {
            "method": self.recipe.method,
            "model": self.recipe.model.name_or_path,
            "weights": self.model.weights,
            "tokenizer": tokenizer_digest(self.encoder.tokenizer),
            "length": self.recipe.prompt.length,
            "hidden_size": self.model.hidden_size,
            "seed": self.recipe.run.seed,
            "versions": versions(),
            "recipe": self.recipe.model_dump(mode="json"),
            "ranks": self.ranks.world,
        }


def start(recipe: Recipe, json_name: str | None) -> tuple[dict, Ranks]:
    """The checked DeepSpeed JSON and this process's place in the job."""
    name = json_name or "resident"
    ds = deepspeed_json.load(name)
    deepspeed_json.check(ds, dtype=recipe.model.dtype, source=name)
    return ds, Ranks(recipe.run.timeout)


def load_rows(ranks: Ranks, recipe: Recipe, tasks: Sequence[Task]) -> list[Splits]:
    """The splits of each task, the same on all ranks."""
    data = recipe.data
    return ranks.together(
        lambda: [load_task(task, root=data.root, split_seed=data.split_seed) for task in tasks],
        once_a_node=data.root is None,
    )


def open_session(recipe: Recipe, ranks: Ranks, ds: dict, cells_per_step: int, stop: StopSignal) -> Session:
    """Loads backbone and tokenizer.

    Args:
        ds: the checked DeepSpeed JSON.
        cells_per_step: rows times prompts of a step over all ranks.

    Raises:
        UserError: a model or a tokenizer that cannot be used.
    """
    model = load_backbone(ranks, recipe.model, ds, cells_per_step)
    tokenizer = ranks.together(lambda: load_tokenizer(model.folder))
    known = model.backbone.config.vocab_size
    if len(tokenizer) > known:  # else the embedding fails in the midst of the run
        have = f"the tokenizer has {len(tokenizer)} tokens, the model {known}"
        raise UserError(f"{model.folder}: {have}; copy the model's own tokenizer there")
    return Session(recipe, model, RowEncoder(tokenizer, recipe.model, recipe.data), stop)


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {"bmtpt_ds": __version__, **{name: version(name) for name in _PACKAGES}}
