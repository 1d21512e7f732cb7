"""What every command begins with: the job's ranks, the rows, the backbone, the tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import NamedTuple

import torch

from bmtpt_ds import __version__
from bmtpt_ds.config import ModelConfig, Recipe, RunConfig
from bmtpt_ds.data.prepared import AGAIN, Prepared
from bmtpt_ds.data.splits import Splits
from bmtpt_ds.data.tokens import RowEncoder, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.hub import find_tokenizer
from bmtpt_ds.model.prompts import initial_prompts
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.quiet import say_if_longer
from bmtpt_ds.stage_inputs import from_hub, read_deepspeed, read_splits
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import Task

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


class RowShape(NamedTuple):
    """Tokens of a row."""

    source: int  # of the encoder, prompt included
    target: int
    taught: bool = False  # whether a teacher reads it too


@dataclass(frozen=True)
class Session:
    """A command at work."""

    recipe: Recipe
    model: Sharded
    encoder: RowEncoder
    stop: StopSignal
    activations: str = ""  # whether a step keeps or recomputes them, for a person; "" where no step is made
    taught: bool = False  # whether a teacher reads the rows of a step too, as in MPT's source stage

    @property
    def ranks(self) -> Ranks:
        return self.model.ranks

    def longest(self, tasks: Iterable[Task]) -> RowShape:
        """The longest row that these tasks can have."""
        tasks = list(tasks)
        source = max(map(self.encoder.max_source_length, tasks))
        target = max(map(self.encoder.max_target_length, tasks))
        return RowShape(self.recipe.prompt_length + source, target, self.taught)

    def initial_prompts(self, count: int) -> torch.Tensor:
        """`count` prompts [count, L, H] as the recipe begins them; all ranks must ask together."""
        prompt, vocab = self.recipe.prompt, self.model.backbone.config.vocab_size
        seed, rows_of = self.recipe.run.seed, self.model.embedding_rows
        return initial_prompts(prompt.init, count, prompt.length, vocab, seed, rows_of, prompt.spread)

    def describe(self) -> str:
        """The model and how it lies on the ranks, in a line for a person."""
        model, ranks = self.recipe.model, self.ranks
        count = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.backbone.parameters())
        nodes = ranks.world // ranks.local_world
        where = f"{ranks.world} {ranks.device.type} rank{'s' * (ranks.world > 1)}"
        where += f" on {nodes} nodes" if nodes > 1 else ""
        layout = f"sharded over {where} (ZeRO-3)" if self.model.stage == 3 else f"whole on each of {where}"
        layout = layout if ranks.world > 1 else f"on {where}"
        dtype = str(model.dtype)
        if dtype == "bfloat16" and ranks.device.type == "cpu" and not _computes_bfloat16():
            dtype += " (tens of times slower than float32 here: this CPU has no instructions for it)"
        return f"model {model.name_or_path}: {count:,} parameters, {dtype}, {layout}"

    def identity(self) -> dict:
        """What a file of prompts belongs to, and how it came about."""
        return {
            "method": self.recipe.method,
            "model": self.recipe.model.name_or_path,
            "weights": self.model.weights,
            "tokenizer": tokenizer_digest(self.encoder.tokenizer),
            "length": self.recipe.prompt_length,
            "hidden_size": self.model.hidden_size,
            "seed": self.recipe.run.seed,
            "versions": versions(),
            "recipe": self.recipe.model_dump(mode="json"),
            "ranks": self.ranks.world,
        }


def start(recipe: Recipe, json_name: str | None) -> tuple[dict, Ranks]:
    """The checked DeepSpeed JSON and this process's place in the job."""
    ds = read_deepspeed(recipe, json_name)
    return ds, Ranks(recipe.run.timeout)


@contextmanager
def at_work(ranks: Ranks, then: str = "") -> Iterator[StopSignal]:
    """Inside, signals ask for a stop between two steps, and an error says on which rank and node it happened.

    Args:
        then: what a user can do after an error, in its last line.
    """
    with StopSignal() as stop, ranks.at_work(then):
        yield stop


def load_rows(ranks: Ranks, recipe: Recipe, tasks: Sequence[Task]) -> list[Splits]:
    """The splits of each task, the same on all ranks."""
    with say_if_longer(f"reading the rows of {', '.join(task.name for task in tasks)}"):
        splits = ranks.together(
            lambda: read_splits(recipe, tasks), once_a_node=any(from_hub(recipe, task) for task in tasks)
        )
    prepared = Prepared.find(recipe.data.root)
    if prepared:
        ranks.together(lambda: _check_token_ids(prepared, recipe, tasks, splits), once_a_node=True)
    return splits


def _check_token_ids(prepared: Prepared, recipe: Recipe, tasks: Sequence[Task], splits: Sequence[Splits]) -> None:
    """Refuses prepared rows that the recipe's tokenizer would encode otherwise; before the model is loaded."""
    tokenizer = load_tokenizer(find_tokenizer(recipe.model.name_or_path))
    prepared.check_tokenizer(tokenizer_digest(tokenizer), recipe.model.name_or_path)
    encoder = RowEncoder(tokenizer, recipe.model, recipe.data)
    for task, of_task in zip(tasks, splits, strict=True):
        row = of_task.train[0]
        if encoder.encode(task, dict(row)) != encoder.encode(task, row):  # an equal vocabulary is not everything
            theirs = ", ".join(f"{name} {number}" for name, number in prepared.manifest.versions.items())
            raise UserError(
                f"data.root {prepared.folder}: its token ids of {task.name} are not what this tokenizer "
                f"gives (prepared with {theirs}); {AGAIN}"
            )


def open_session(
    recipe: Recipe,
    ranks: Ranks,
    ds: dict,
    cells_per_step: int,
    stop: StopSignal,
    trained_on: Sequence[Task] = (),
    *,
    taught: bool = False,
) -> Session:
    """Loads backbone and tokenizer.

    Args:
        ds: the checked DeepSpeed JSON.
        cells_per_step: rows times prompts of a step over all ranks.
        trained_on: the tasks whose rows have a backward pass.
        taught: whether a teacher reads these rows too.

    Raises:
        UserError: a model or a tokenizer that cannot be used.
    """
    model = load_backbone(ranks, recipe.model, ds, cells_per_step)
    tokenizer = ranks.together(lambda: load_tokenizer(model.folder))
    encoder = RowEncoder(tokenizer, recipe.model, recipe.data)
    session = Session(recipe, model, encoder, stop, taught=taught)
    if not trained_on:
        return session
    settled = settle_activations(recipe.model, model, cells_per_step, session.longest(trained_on), recipe.run)
    return replace(session, activations=settled)


def settle_activations(
    asked: ModelConfig, model: Sharded, cells_per_step: int, longest: RowShape, run: RunConfig
) -> str:
    """Whether activations are kept or recomputed, and who said so; without a word from the user memory decides."""
    if asked.activation_checkpointing != "auto" or model.backbone.checkpoints_activations:
        who = "DeepSpeed JSON" if asked.activation_checkpointing == "auto" else "recipe"
        return f"activations {'recomputed' if model.backbone.checkpoints_activations else 'kept'}, as the {who} says"
    length, *rest = longest
    return str(model.choose_checkpointing(cells_per_step, length, run.max_tokens_per_micro_batch, *rest))


def _computes_bfloat16() -> bool:
    """Whether torch has more than a plain loop for products of bfloat16 matrices on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {"bmtpt_ds": __version__, **{name: version(name) for name in _PACKAGES}}
