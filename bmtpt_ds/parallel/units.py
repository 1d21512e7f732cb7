"""T5's blocks under ZeRO-3: the matrices of each lie in one sharded parameter, gathered in one piece before their turn.

DeepSpeed shards that parameter, gathers it and says where its parts live (hpZ, host memory, NVMe). When that happens is
settled here: the order of T5's blocks is known, so nothing is traced, and a block takes a few calls of the host where
hooks that look after its eight to fourteen matrices and norms one by one take 1.8 ms. In one piece a gather writes
where the weights are read; DeepSpeed copies the parts of several into a buffer and out of it again.

    forward    [wait for a block, gather the next] compute [let go] ...
    backward   [wait for a block, gather the one before] compute [let go] ...

A gather begins when the block before the one at work is done, on a stream of its own: the device holds two blocks,
however far the host is ahead of it. Norms and position biases stay whole on every rank.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from bmtpt_ds.model.memory import Live

FORWARD, BACKWARD = 1, -1


class Unit:
    """A block whose matrices are parts of one parameter, empty where that is not gathered."""

    def __init__(self, matrices: Sequence[nn.Linear], flat: nn.Parameter):
        """
        Args:
            matrices: the block's linear layers, whose weights have shapes but no memory; they get it from the unit.
            flat: [sum of their sizes], sharded.
        """
        self.flat, self.numbers = flat, flat.ds_numel
        self.arriving: Any = None  # DeepSpeed's handle of a gather that has begun
        self.here = False
        self._nothing = flat.new_empty(0)
        self._shapes = [layer.weight.shape for layer in matrices]
        # What autograd keeps for the backward pass is the tensor itself, so that it is empty in between.
        self._parts = [flat.new_empty(0) for _ in matrices]
        for layer, part in zip(matrices, self._parts, strict=True):
            del layer.weight  # a parameter; DeepSpeed is to see the flat one alone
            layer.weight = part

    def stays_whole(self) -> bool:
        """Whether the shard is all, where it is wanted: on one rank alone, nothing offloaded. Then it is there."""
        shard = self.flat.ds_tensor
        if shard.numel() < self.numbers or shard.device != self.flat.device:
            return False
        if not self.here:
            self.flat.data = shard.data
            self.arrive()
        return True

    def arrive(self) -> None:
        self.arriving, self.here = None, True
        values = self.flat.data.split([shape.numel() for shape in self._shapes])
        for part, shape, its in zip(self._parts, self._shapes, values, strict=True):
            part.data = its.view(shape)

    @torch.no_grad()
    def leave(self) -> None:
        self.here, flat = False, self.flat
        for part in self._parts:
            part.data = self._nothing
        on_disk = flat.ds_tensor.final_location is not None
        lacks_copy = flat.ds_zero_param_process_group is not None and flat.ds_secondary_tensor is None  # hpZ's
        if on_disk or lacks_copy:
            flat.partition()
        else:  # DeepSpeed would keep the memory until the device is done; the next gather waits for that anyway
            flat.data, flat.ds_status = self._nothing, ZeroParamStatus.NOT_AVAILABLE


class Units:
    """Gathers the blocks of encoder and decoder in turn and lets them go; all ranks must make the same passes."""

    def __init__(self, units: Sequence[Unit], zero: Mapping[str, Any], live: Live):
        """
        Args:
            units: in the order of a forward pass.
            zero: the resolved DeepSpeed JSON's `zero_optimization`.
        """
        self._units, self._live = units, live
        self._first_kept = len(units) - live.kept([unit.numbers for unit in units])
        self._quantized = zero.get("zero_quantized_weights", False)
        device = get_accelerator()
        beside = zero.get("overlap_comm", True) and not device.is_synchronized_device()
        self._stream = device.Stream() if beside else None

    def run(self, index: int, forward: Callable, *inputs: Any, **named: Any) -> tuple:
        """A block's forward pass, its weights there for as long as they are needed, now and in the backward pass."""
        if self._units[index].stays_whole():
            return forward(*inputs, **named)
        self._enter(index, BACKWARD if _in_backward() else FORWARD)
        there = [value for value in (*inputs, *named.values()) if torch.is_tensor(value) and value.requires_grad]
        tracked = bool(there) and torch.is_grad_enabled()
        if tracked:
            behind = dict(zip(map(id, there), _BackwardEnds.apply(self, index, *there), strict=True))
            inputs = [behind.get(id(value), value) for value in inputs]
            named = {name: behind.get(id(value), value) for name, value in named.items()}
        output, *others = forward(*inputs, **named)
        if tracked:
            output = _BackwardBegins.apply(self, index, output)
        kept = tracked and index >= self._first_kept
        if not kept and not _in_backward():  # recomputed: its gradient is next
            self._units[index].leave()
        return output, *others

    @torch.no_grad()
    def _enter(self, index: int, direction: int) -> None:
        unit = self._units[index]
        if not unit.here and not unit.arriving:
            for stray in self._units:  # gathered ahead of a pass that did not come
                if stray.arriving:
                    self._wait(stray)
                    stray.leave()
            self._gather(unit)
        self._wait(unit)
        self._gather_ahead(index, direction)

    def _gather_ahead(self, index: int, direction: int) -> None:
        live = sum(unit.numbers for unit in self._units if unit.here or unit.arriving)
        ahead, at = 0, index + direction
        while ahead < self._live.ahead and 0 <= at < len(self._units):
            unit = self._units[at]
            if not unit.here and not unit.arriving:
                live += unit.numbers
                if live > self._live.blocks:
                    return
                self._gather(unit)
            ahead += unit.numbers
            at += direction

    def _gather(self, unit: Unit) -> None:
        if self._stream is not None:
            self._stream.wait_stream(get_accelerator().current_stream())
        quantize = self._quantized or hasattr(unit.flat.ds_tensor, "ds_quant_scale")
        with self._beside():
            unit.arriving = unit.flat.all_gather_coalesced([unit.flat], quantize=quantize)

    def _wait(self, unit: Unit) -> None:
        if not unit.arriving:
            return
        with self._beside():
            unit.arriving.wait()
        if self._stream is not None:
            get_accelerator().current_stream().wait_stream(self._stream)
        unit.arrive()

    def _beside(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else get_accelerator().stream(self._stream)

    def backward_begins(self, index: int) -> None:
        self._enter(index, BACKWARD)

    def backward_ends(self, index: int) -> None:
        self._units[index].leave()


class _BackwardBegins(torch.autograd.Function):
    """Behind a block."""

    @staticmethod
    def forward(ctx, units: Units, index: int, output: Tensor) -> Tensor:
        ctx.begins = partial(units.backward_begins, index)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, Tensor]:
        ctx.begins()
        return None, None, gradient


class _BackwardEnds(torch.autograd.Function):
    """Before a block: its turn comes when the gradients of all the block's inputs are there."""

    @staticmethod
    def forward(ctx, units: Units, index: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.ends = partial(units.backward_ends, index)
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in inputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.ends()
        return None, None, *gradients


def _in_backward() -> bool:
    """Whether autograd is at work, as where activations are recomputed."""
    return torch._C._current_graph_task_id() != -1
