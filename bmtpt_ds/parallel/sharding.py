"""The frozen backbone in a DeepSpeed engine: built in shards, filled tensor by tensor, compared with its checkpoint."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from transformers import T5Config

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import FREE_TEXT
from bmtpt_ds.hub import find_model
from bmtpt_ds.model.backbone import Backbone, checkpoint_activations, prepared_config, read_config
from bmtpt_ds.model.footprint import row_bytes
from bmtpt_ds.model.memory import Choice, Share, activation_memory, choose, gathered_bytes, live_blocks, token_budget
from bmtpt_ds.model.shapes import shape
from bmtpt_ds.model.weights import CheckpointReader
from bmtpt_ds.model_folder import Architecture, architecture_of, read_architecture
from bmtpt_ds.parallel.building import Built, build_resident, build_sharded, settled, without_blocks
from bmtpt_ds.parallel.ranks import Ranks
from bmtpt_ds.parallel.stored import Stored, fill, fill_at_random, verify, whole
from bmtpt_ds.quiet import hush

# fills tensors -> the fingerprints that they should have, if there are any; the weights' digest
_Fill = Callable[[Sequence[Stored]], tuple[torch.Tensor | None, str]]


@dataclass(frozen=True)
class Sharded:
    """A loaded backbone and what is known of it."""

    backbone: Backbone  # frozen; call it, never its parameters: they may be elsewhere
    folder: Path | None  # where its tokenizer lies too; None: the weights are random numbers
    architecture: Architecture
    weights: str  # digest of the checkpoint as stored
    stage: int  # ZeRO stage, 0 or 3
    ds: dict  # the resolved DeepSpeed JSON
    ranks: Ranks

    @property
    def hidden_size(self) -> int:
        return self.backbone.config.d_model

    @property
    def synced(self) -> bool:
        """Whether all ranks must make the same passes."""
        return self.stage == 3 and self.ranks.world > 1

    def embedding_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [N, H] of the input embedding, in float32; all ranks must ask together."""
        weight = self.backbone.shared.weight
        with whole(weight):
            return weight.detach()[ids.to(weight.device)].float().to(self.ranks.device)

    def token_budget(self, asked: int | str, length: int, target_tokens: int = FREE_TEXT, taught: bool = False) -> int:
        """Tokens of a micro-batch: as the recipe says, or what the free memory holds.

        Args:
            length: encoder tokens of the longest row, prompt included.
            target_tokens: of the longest target.
            taught: whether a teacher reads the rows too.
        """
        if asked != "auto":
            return int(asked)
        recomputes = self.backbone.checkpoints_activations
        of_row = self._row_bytes(length, target_tokens, taught, checkpointing=recomputes)
        return token_budget(self._activation_memory(), of_row, length, target_tokens)

    def choose_checkpointing(
        self, rows: int, length: int, max_tokens: int | str, target_tokens: int = FREE_TEXT, taught: bool = False
    ) -> Choice:
        """Switches activation checkpointing on if a step of training needs it; all ranks must ask together.

        Args:
            rows: times prompts, of a step over all ranks.
            length, target_tokens, taught: as in `token_budget`.
            max_tokens: of a micro-batch, as the recipe says, or `auto`.
        """
        share = Share(
            rows=-(-rows // self.ranks.world),
            row_tokens=length + target_tokens,
            micro_batch=None if max_tokens == "auto" else int(max_tokens),
        )
        of_row = self._row_bytes(length, target_tokens, taught, checkpointing=False)
        choice = choose(share, row_bytes=of_row, memory=self._activation_memory(), gathered=self.synced)
        if choice.recompute:
            checkpoint_activations(self.backbone)
        return choice

    def _row_bytes(self, length: int, target_tokens: int, taught: bool, *, checkpointing: bool) -> int:
        return row_bytes(
            self.architecture,
            bytes_per_value=self._bytes_per_value,
            checkpointing=checkpointing,
            source_tokens=length,
            target_tokens=target_tokens,
            taught=taught,
        )

    def _activation_memory(self) -> int:
        """Bytes that a micro-batch's activations may take, the same on all ranks."""
        gathered = 0
        if self.synced:
            gathered = gathered_bytes(self.architecture, self._bytes_per_value, self.ds["zero_optimization"])
        return activation_memory(self.ranks.free_memory(), gathered)

    @property
    def _bytes_per_value(self) -> int:
        return self.backbone.shared.weight.element_size()


def load_backbone(ranks: Ranks, model: ModelConfig, ds: dict, cells_per_step: int = 1) -> Sharded:
    """Builds the frozen T5, shards it as the DeepSpeed JSON says and fills it tensor by tensor from its checkpoint.

    Activation checkpointing stays off where recipe and JSON leave it open: `Sharded.choose_checkpointing` settles it.
    Under stage 3 no rank ever holds the model whole: parameters are sharded as they come into being, rank 0 reads one
    tensor at a time. In the end a fingerprint of every tensor, taken of the shards, is compared with the checkpoint's.

    Args:
        ds: a checked DeepSpeed JSON; its "auto" values are resolved here.
        cells_per_step: rows times prompts of a step over all ranks, what the JSON's batch keys may say.

    Raises:
        UserError: no such model, a damaged checkpoint, or one of another architecture than its config.json says.
    """
    folder = ranks.together(lambda: find_model(model.name_or_path), once_a_node=True)
    config = ranks.together(lambda: read_config(folder, model.dropout))
    # a tensor is read once, on rank 0; the others learn from it what they need
    reader = ranks.first_does(lambda: CheckpointReader(folder))
    own_head = ranks.from_first(ranks.first_does(lambda: reader.has_own_head()))
    lay_out = _Layout(ranks, model, ds, read_architecture(folder), cells_per_step)
    return lay_out(config, own_head, lambda tensors: fill(ranks, tensors, reader, lay_out.dtype), folder)


def random_backbone(ranks: Ranks, model: ModelConfig, ds: dict, cells_per_step: int = 1) -> Sharded:
    """As `load_backbone`, of the published T5 whose name `model.name_or_path` is, with random weights: for measuring.

    Raises:
        UserError: no such name.
    """
    values = shape(model.name_or_path)
    lay_out = _Layout(ranks, model, ds, architecture_of(values, model.name_or_path), cells_per_step)
    config = prepared_config(T5Config(**values), model.dropout)

    def at_random(tensors: Sequence[Stored]) -> tuple[None, str]:
        fill_at_random(tensors, config.d_kv)
        return None, "random"

    return lay_out(config, not values["tie_word_embeddings"], at_random, None)


class _Layout:
    """How a DeepSpeed JSON wants a backbone laid out; called, it builds one."""

    def __init__(self, ranks: Ranks, model: ModelConfig, ds: dict, architecture: Architecture, cells_per_step: int):
        self._ranks, self._model, self._architecture = ranks, model, architecture
        self.dtype = getattr(torch, model.dtype)
        resolved = deepspeed_json.resolve(
            ds,
            architecture=architecture,
            dtype=model.dtype,
            micro_batch=-(-cells_per_step // ranks.world),
            world=ranks.world,
            local_world=ranks.local_world,
        )
        self._ds = settled(resolved) if deepspeed_json.stage(resolved) == 3 else resolved

    def __call__(self, config: T5Config, own_head: bool, fill_in: _Fill, folder: Path | None) -> Sharded:
        ranks, ds, stage = self._ranks, self._ds, deepspeed_json.stage(self._ds)
        ranks.reuse_freed_memory(stage == 0)
        built = self._build(config, own_head, stage)
        expected, weights = fill_in(built.tensors)
        its_own = without_blocks(built.backbone) if stage == 3 else nullcontext()
        with hush(), its_own:  # in bfloat16 it prints its memory
            engine, *_ = deepspeed.initialize(model=built.backbone, config=ds)
        if expected is not None:
            verify(ranks, built.tensors, expected)
        backbone = engine.module
        _set_activation_checkpointing(backbone, self._model.activation_checkpointing, ds)
        backbone.train_while_tuning = backbone.train_while_tuning or self._model.dropout > 0
        return Sharded(backbone, folder, self._architecture, weights, stage, ds, ranks)

    def _build(self, config: T5Config, own_head: bool, stage: int) -> Built:
        to = {"dtype": self.dtype, "own_head": own_head, "device": self._ranks.device}
        if stage != 3:
            return build_resident(config, **to)
        live = live_blocks(self._architecture, self._ds["zero_optimization"])
        return build_sharded(config, **to, ds=self._ds, live=live)


def _set_activation_checkpointing(backbone: Backbone, asked: bool | str, ds: dict) -> None:
    """On if the recipe says so, or leaves it open and the JSON has a section for it, which DeepSpeed's own honours."""
    section = ds.get("activation_checkpointing")
    if not (bool(section) if asked == "auto" else asked):
        return
    if not section:
        checkpoint_activations(backbone)
        return
    deepspeed.checkpointing.configure(None, deepspeed_config=ds)
    checkpoint_activations(backbone, deepspeed.checkpointing.checkpoint)
