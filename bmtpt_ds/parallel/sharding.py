"""The frozen backbone in a DeepSpeed engine: built in shards, filled tensor by tensor, compared with its checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from transformers import T5Config

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import FREE_TEXT
from bmtpt_ds.hub import find_model
from bmtpt_ds.model.backbone import (
    Backbone,
    build_backbone,
    checkpoint_activations,
    prepared_config,
    read_config,
)
from bmtpt_ds.model.footprint import row_bytes
from bmtpt_ds.model.memory import Choice, Share, activation_memory, choose, gathered_bytes, token_budget
from bmtpt_ds.model.shapes import shape
from bmtpt_ds.model.weights import CheckpointReader, WeightsIdentity, fingerprint
from bmtpt_ds.model_folder import Architecture, architecture_of, read_architecture
from bmtpt_ds.parallel.ranks import Ranks
from bmtpt_ds.progress import Pass
from bmtpt_ds.quiet import hush
from bmtpt_ds.readable import readable_bytes

_Fill = Callable[[Backbone], tuple[torch.Tensor | None, str]]  # -> fingerprints, if it has some; the weights' digest


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
        with _whole(weight):
            return weight.detach()[ids.to(weight.device)].float().to(self.ranks.device)

    def token_budget(self, asked: int | str, length: int, target_tokens: int = FREE_TEXT) -> int:
        """Tokens of a micro-batch: as the recipe says, or what the free memory holds.

        Args:
            length: encoder tokens of the longest row, prompt included.
            target_tokens: of the longest target.
        """
        if asked != "auto":
            return int(asked)
        of_row = self._row_bytes(length, target_tokens, checkpointing=self.backbone.checkpoints_activations)
        return token_budget(self._activation_memory(), of_row, length, target_tokens)

    def choose_checkpointing(
        self, rows: int, length: int, max_tokens: int | str, target_tokens: int = FREE_TEXT
    ) -> Choice:
        """Switches activation checkpointing on if a step of training needs it; all ranks must ask together.

        Args:
            rows: times prompts, of a step over all ranks.
            length, target_tokens: as in `token_budget`.
            max_tokens: of a micro-batch, as the recipe says, or `auto`.
        """
        share = Share(
            rows=-(-rows // self.ranks.world),
            row_tokens=length + target_tokens,
            micro_batch=None if max_tokens == "auto" else int(max_tokens),
        )
        of_row = self._row_bytes(length, target_tokens, checkpointing=False)
        choice = choose(share, row_bytes=of_row, memory=self._activation_memory(), gathered=self.synced)
        if choice.recompute:
            checkpoint_activations(self.backbone)
        return choice

    def _row_bytes(self, length: int, target_tokens: int, *, checkpointing: bool) -> int:
        return row_bytes(
            self.architecture,
            bytes_per_value=self._bytes_per_value,
            checkpointing=checkpointing,
            source_tokens=length,
            target_tokens=target_tokens,
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
    return lay_out(config, own_head, lambda backbone: _fill(ranks, backbone, reader, lay_out.dtype), folder)


def random_backbone(ranks: Ranks, model: ModelConfig, ds: dict, cells_per_step: int = 1) -> Sharded:
    """As `load_backbone`, of the published T5 whose name `model.name_or_path` is, with random weights: for measuring.

    Raises:
        UserError: no such name.
    """
    values = shape(model.name_or_path)
    lay_out = _Layout(ranks, model, ds, architecture_of(values, model.name_or_path), cells_per_step)
    config = prepared_config(T5Config(**values), model.dropout)
    return lay_out(config, not values["tie_word_embeddings"], _fill_at_random, None)


class _Layout:
    """How a DeepSpeed JSON wants a backbone laid out; called, it builds one."""

    def __init__(self, ranks: Ranks, model: ModelConfig, ds: dict, architecture: Architecture, cells_per_step: int):
        self._ranks, self._model, self._architecture = ranks, model, architecture
        self.dtype = getattr(torch, model.dtype)
        self._ds = deepspeed_json.resolve(
            ds,
            architecture=architecture,
            dtype=model.dtype,
            micro_batch=-(-cells_per_step // ranks.world),
            world=ranks.world,
            local_world=ranks.local_world,
        )

    def __call__(self, config: T5Config, own_head: bool, fill: _Fill, folder: Path | None) -> Sharded:
        ranks, ds, stage = self._ranks, self._ds, deepspeed_json.stage(self._ds)
        ranks.reuse_freed_memory(stage == 0)
        # The dtype comes from the JSON's bf16 section, which `check` holds to the recipe: zero.Init's own argument of
        # that name turns float32 into bfloat16 where fp16 is not supported (DeepSpeed 0.19.8, a CPU).
        sharding = deepspeed.zero.Init(config_dict_or_path=ds) if stage == 3 else ranks.device
        backbone = build_backbone(config, dtype=self.dtype, own_head=own_head, building=sharding)
        expected, weights = fill(backbone)
        with hush():  # in bfloat16 it prints its memory
            engine, *_ = deepspeed.initialize(model=backbone, config=ds)
        if expected is not None:
            _verify(ranks, backbone, expected)
        _set_activation_checkpointing(backbone, self._model.activation_checkpointing, ds)
        backbone.train_while_tuning = backbone.train_while_tuning or self._model.dropout > 0
        return Sharded(engine.module, folder, self._architecture, weights, stage, ds, ranks)


@contextmanager
def _whole(parameter: torch.nn.Parameter, *, filled_by_first: bool = False) -> Iterator[None]:
    """Inside, the parameter is whole; afterwards it is sharded again, as rank 0 filled it if it did."""
    sharded = hasattr(parameter, "ds_id")
    inner = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if filled_by_first else None)
    with inner if sharded else nullcontext():
        yield
    if filled_by_first and not sharded and dist.get_world_size() > 1:
        dist.broadcast(parameter.data, src=0)


def _fill(
    ranks: Ranks, backbone: Backbone, reader: CheckpointReader | None, dtype: torch.dtype
) -> tuple[torch.Tensor, str]:
    """Copies the checkpoint into the backbone, one tensor at a time.

    Returns:
        fingerprints [tensors] that the filled tensors should have (the same on all ranks), and the weights' digest.
    """
    marks, identity = [], WeightsIdentity()
    size = sum(map(_bytes, backbone.parameters()))
    with Pass("loading the model", size, shown=ranks.first, unit=readable_bytes) as progress:
        for name, parameter in backbone.named_parameters():
            stored = ranks.first_does(lambda name=name, p=parameter: reader.read_shaped(name, _shape(p)))
            with _whole(parameter, filled_by_first=True):
                if ranks.first:
                    cast = stored.to(dtype)
                    parameter.data.copy_(cast)
                    identity.add(name, stored)
                    marks.append(fingerprint(cast.contiguous()))
            progress.advance(_bytes(parameter))
    expected = torch.stack(marks) if marks else torch.zeros(sum(1 for _ in backbone.parameters()), dtype=torch.int64)
    expected = expected.to(ranks.device)
    ranks.broadcast_(expected)
    return expected, ranks.from_first(identity.hexdigest())


@torch.no_grad()
def _fill_at_random(backbone: Backbone) -> tuple[None, str]:
    """As T5 is initialised, about: activations stay of the size that they have in a trained model."""
    for i, (name, parameter) in enumerate(backbone.named_parameters()):
        held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        if "layer_norm" in name:
            held.data.fill_(1.0)
            continue
        wide = name.startswith("shared.") or "relative_attention_bias" in name
        fan_in = 1 if wide else getattr(parameter, "ds_shape", parameter.shape)[-1]
        if name.endswith(".q.weight"):  # T5 does not scale its scores
            fan_in *= backbone.config.d_kv
        generator = torch.Generator(held.device).manual_seed(i)  # a resident rank's are the others'
        held.data.normal_(std=fan_in**-0.5, generator=generator)
    return None, "random"


def _bytes(parameter: torch.nn.Parameter) -> int:
    """Of the whole parameter, wherever its parts are."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter, wherever its parts are."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _verify(ranks: Ranks, backbone: Backbone, expected: torch.Tensor) -> None:
    """Compares every tensor, as it lies in its shards, with the fingerprint of what was read."""
    names, marks, sharded = [], [], False
    for name, parameter in backbone.named_parameters():
        names.append(name)
        shard = getattr(parameter, "ds_tensor", None)
        if shard is None:
            marks.append(fingerprint(parameter.data.contiguous()))
            continue
        sharded = True
        start = shard.numel() * dist.get_rank(parameter.ds_process_group)
        inside = max(0, min(shard.numel(), parameter.ds_numel - start))
        marks.append(fingerprint(shard.data.view(-1)[:inside], offset=start).to(ranks.device))
    found = torch.stack(marks)
    if sharded:
        ranks.sum_(found)
    wrong = [name for name, same in zip(names, (found == expected).tolist(), strict=True) if not same]
    if ranks.any(bool(wrong)):
        raise RuntimeError(f"rank {ranks.rank}: loaded weights differ from the checkpoint's: {', '.join(wrong[:5])}")


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
