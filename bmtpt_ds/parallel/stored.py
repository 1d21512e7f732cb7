"""The checkpoint's tensors in a backbone's memory: filled one at a time, later compared with their fingerprints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import deepspeed
import deepspeed.comm as dist
import torch
from torch import nn

from bmtpt_ds.model.weights import CheckpointReader, WeightsIdentity, fingerprint
from bmtpt_ds.parallel.ranks import Ranks
from bmtpt_ds.progress import Pass
from bmtpt_ds.readable import readable_bytes


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint, and where it lies in memory."""

    name: str
    shape: torch.Size
    holder: nn.Parameter  # the tensor's own, or one that several share, flat
    begin: int = 0  # its first element in the holder

    @property
    def numbers(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.numbers * self.holder.element_size()

    def values(self) -> torch.Tensor:
        """The tensor itself, where its holder is whole."""
        return self.holder.data.view(-1)[self.begin : self.begin + self.numbers].view(self.shape)

    def here(self) -> tuple[torch.Tensor, int]:
        """What lies on this rank between steps, flat, perhaps nothing, and where in the tensor that begins."""
        shard = getattr(self.holder, "ds_tensor", None)
        if shard is None:
            return self.values().reshape(-1), 0
        first = shard.numel() * dist.get_rank(self.holder.ds_process_group)
        begin = max(self.begin, first)
        end = max(begin, min(self.begin + self.numbers, first + shard.numel()))
        return shard.data.view(-1)[begin - first : end - first], begin - self.begin


def tensors_of(model: nn.Module) -> list[Stored]:
    """Of a model whose parameters are the checkpoint's tensors."""
    return [Stored(name, parameter.shape, parameter) for name, parameter in model.named_parameters()]


@contextmanager
def whole(parameter: nn.Parameter, *, filled_by_first: bool = False) -> Iterator[None]:
    """Inside, the parameter is whole; afterwards it is sharded again, as rank 0 filled it if it did."""
    sharded = hasattr(parameter, "ds_id")
    inner = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if filled_by_first else None)
    with inner if sharded else nullcontext():
        yield
    if filled_by_first and not sharded and dist.get_world_size() > 1:
        dist.broadcast(parameter.data, src=0)


def fill(
    ranks: Ranks, tensors: Sequence[Stored], reader: CheckpointReader | None, dtype: torch.dtype
) -> tuple[torch.Tensor, str]:
    """Copies the checkpoint into the tensors, one at a time.

    Args:
        reader: on rank 0, which alone reads.

    Returns:
        fingerprints [tensors] that they should have then (the same on all ranks), and the weights' digest.
    """
    marks, identity = [], WeightsIdentity()
    size = sum(tensor.nbytes for tensor in tensors)
    with Pass("loading the model", size, shown=ranks.first, unit=readable_bytes) as progress:
        for _, sharing in groupby(tensors, lambda tensor: id(tensor.holder)):
            together = list(sharing)
            with whole(together[0].holder, filled_by_first=True):
                for tensor in together:
                    stored = ranks.first_does(lambda t=tensor: reader.read_shaped(t.name, tuple(t.shape)))
                    if ranks.first:
                        cast = stored.to(dtype)
                        tensor.values().copy_(cast)
                        identity.add(tensor.name, stored)
                        marks.append(fingerprint(cast.contiguous()))
                    progress.advance(tensor.nbytes)
    expected = torch.stack(marks) if marks else torch.zeros(len(tensors), dtype=torch.int64)
    expected = expected.to(ranks.device)
    ranks.broadcast_(expected)
    return expected, ranks.from_first(identity.hexdigest())


@torch.no_grad()
def fill_at_random(tensors: Sequence[Stored], values_of_head: int) -> None:
    """As T5 is initialised, about: activations stay of the size that they have in a trained model.

    Args:
        values_of_head: d, of a query.
    """
    for i, tensor in enumerate(tensors):
        here, _ = tensor.here()
        if "layer_norm" in tensor.name:
            here.fill_(1.0)
            continue
        wide = tensor.name.startswith("shared.") or "relative_attention_bias" in tensor.name
        fan_in = 1 if wide else tensor.shape[-1]
        if tensor.name.endswith(".q.weight"):  # T5 does not scale its scores
            fan_in *= values_of_head
        generator = torch.Generator(here.device).manual_seed(i)  # a resident rank's are the others'
        here.normal_(std=fan_in**-0.5, generator=generator)


def verify(ranks: Ranks, tensors: Sequence[Stored], expected: torch.Tensor) -> None:
    """Compares every tensor, as it lies in its shards, with the fingerprint of what was read.

    Raises:
        RuntimeError: on every rank if one has found a difference.
    """
    sharded = torch.tensor([hasattr(tensor.holder, "ds_tensor") for tensor in tensors], device=ranks.device)
    marks = [fingerprint(here.contiguous(), offset) for here, offset in (tensor.here() for tensor in tensors)]
    found = torch.stack([mark.to(ranks.device) for mark in marks])
    together = found * sharded  # a whole one is compared on each rank
    ranks.sum_(together)
    same = (torch.where(sharded, together, found) == expected).tolist()
    wrong = [tensor.name for tensor, right in zip(tensors, same, strict=True) if not right]
    if ranks.any(bool(wrong)):
        raise RuntimeError(f"rank {ranks.rank}: loaded weights differ from the checkpoint's: {', '.join(wrong[:5])}")
