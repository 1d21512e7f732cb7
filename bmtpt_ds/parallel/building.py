"""A backbone under ZeRO-3: made without memory, which it then gets shard by shard, a T5 block's matrices together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import nn
from transformers import T5Config

from bmtpt_ds.model.backbone import Backbone, build_backbone
from bmtpt_ds.model.frozen import use_sharded_layers
from bmtpt_ds.model.memory import Live
from bmtpt_ds.parallel.stored import Stored, tensors_of
from bmtpt_ds.parallel.units import Unit, Units

_UNITS = ("leaf_module", "stage3_module_granularity_threshold")  # what is gathered at once


def settled(ds: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed JSON without what is done in a way of our own: DeepSpeed is not to do it, too."""
    # it would look for T5's blocks among modules where they are not
    zero = {key: value for key, value in ds["zero_optimization"].items() if key not in _UNITS}
    # in place of torch's linear for the whole process: one that keeps its input and takes the host 0.1 ms a call
    zero["memory_efficient_linear"] = False
    return {**ds, "zero_optimization": zero}


class Built(NamedTuple):
    """A backbone with memory but without values."""

    backbone: Backbone
    tensors: list[Stored]  # what of the checkpoint belongs where


class _Sharded(nn.Module):
    """Made inside `deepspeed.zero.Init`, which shards a module's parameters as they come into being."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))


def build_resident(config: T5Config, *, dtype: torch.dtype, own_head: bool, device: torch.device) -> Built:
    backbone = build_backbone(config, dtype=dtype, own_head=own_head, building=device)
    return Built(backbone, tensors_of(backbone))


def build_sharded(
    config: T5Config, *, dtype: torch.dtype, own_head: bool, device: torch.device, ds: Mapping[str, Any], live: Live
) -> Built:
    """No rank holds more than its shards, and a block or the embedding.

    Args:
        ds: the resolved DeepSpeed JSON, stage 3, `settled`.
        live: how much of the blocks may be whole at a time.
    """
    backbone = build_backbone(config, dtype=dtype, own_head=own_head, building=torch.device("meta"))
    blocks = [*backbone.encoder.block, *backbone.decoder.block]  # in the order of a forward pass
    matrices = [[part for part in block.modules() if isinstance(part, nn.Linear)] for block in blocks]
    places = _sharded_places(backbone, matrices, blocks, dtype, ds)
    for block in blocks:
        for parameter in block.parameters():
            if parameter not in places:  # norms and position bias
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                places[parameter] = _Place(nn.Parameter(values), 0)
    tensors = [Stored(name, parameter.shape, *places[parameter]) for name, parameter in backbone.named_parameters()]
    flats = [places[layers[0].weight].holder for layers in matrices]
    units = Units(list(map(Unit, matrices, flats)), ds["zero_optimization"], live)
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, places[parameter].holder)
    for index, (block, flat) in enumerate(zip(blocks, flats, strict=True)):
        block.register_parameter("matrices", flat)
        # not a class of its own, and innermost: activation checkpointing calls the block
        block.forward = partial(units.run, index, block.forward)
    backbone.requires_grad_(False)
    use_sharded_layers(backbone)
    return Built(backbone, tensors)


class _Place(NamedTuple):
    """Where a parameter that was made without memory lies."""

    holder: nn.Parameter
    begin: int  # its first element there


def _sharded_places(
    backbone: Backbone,
    matrices: Sequence[Sequence[nn.Linear]],
    blocks: Sequence[nn.Module],
    dtype: torch.dtype,
    ds: Mapping[str, Any],
) -> dict[nn.Parameter, _Place]:
    """Shards for the matrices of each block together, and for each parameter outside the blocks."""
    places = {}
    inside = {parameter for block in blocks for parameter in block.parameters()}
    # The dtype comes from the JSON's bf16 section, which `check` holds to the recipe: zero.Init's own argument of
    # that name turns float32 into bfloat16 where fp16 is not supported (DeepSpeed 0.19.8, a CPU).
    with deepspeed.zero.Init(config_dict_or_path=dict(ds)):
        for layers in matrices:
            sizes = [layer.weight.numel() for layer in layers]
            flat = _Sharded(torch.Size([sum(sizes)]), dtype).weight
            begins = accumulate(sizes, initial=0)
            places |= {layer.weight: _Place(flat, begin) for layer, begin in zip(layers, begins, strict=False)}
        for parameter in backbone.parameters():
            if parameter not in inside:
                places[parameter] = _Place(_Sharded(parameter.shape, dtype).weight, 0)
    return places


@contextmanager
def without_blocks(backbone: Backbone) -> Iterator[None]:
    """Inside, the backbone has no blocks: what DeepSpeed's engine does to a model, it does to the rest."""
    stacks = (backbone.encoder, backbone.decoder)
    blocks = [stack.block for stack in stacks]
    for stack in stacks:
        stack.block = nn.ModuleList()
    try:
        yield
    finally:
        for stack, its in zip(stacks, blocks, strict=True):
            stack.block = its
