"""What reaches a GPU's launcher from attention's kernels, on a machine that has none: a line of JSON a launch.

    python -m tests.model.launched_attention

Two layers on tensors of the same layout, then one whose rows are not aligned. Each line: kernel, grid, its arguments (a
tensor by its place in the layer), and whether Triton's just-in-time compiler was asked.
"""

import json
import os
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bmtpt_ds.model.attention import Tiling, attend, attend_gradient
from bmtpt_ds.model.packed import Span

HEADS, D, TOKENS = 2, 16, 40


class Launcher:
    """In the place of the one that hands a kernel to CUDA."""

    def __init__(self, source: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, *arguments: Any, **named: Any) -> None:
        grid, given = arguments[:3], arguments[9:]
        seen.append({"kernel": self.name, "grid": grid, "given": [_described(value) for value in given]})


class Driver:
    """Of an H100, as far as a launch asks it."""

    launcher_cls = Launcher

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 2, 32, 0, 1024  # module, function, registers, spills, threads

        @staticmethod
        def unload_module(module: int) -> None: ...

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


seen: list[dict] = []
tensors: dict[int, str] = {}  # what there is, by address
alive: list[torch.Tensor] = []  # so that no address comes twice


def _described(value: Any) -> Any:
    return tensors.get(value.data_ptr(), "another") if isinstance(value, torch.Tensor) else value


def layer(tiling: Tiling, begin: int) -> None:
    """Forward and backward pass on new tensors, whose memory begins so many numbers late."""

    def new(width: int) -> torch.Tensor:
        return torch.zeros(TOKENS * width + begin, dtype=torch.bfloat16)[begin:].view(TOKENS, width)

    made, of_made, gradient = new(3 * HEADS * D), new(3 * HEADS * D), new(HEADS * D)
    states, into = made.chunk(3, dim=1), of_made.chunk(3, dim=1)
    tensors.update({part.data_ptr(): f"state {i}" for i, part in enumerate([*states, *into, gradient])})
    out, sums = attend(*states, tiling)
    tensors.update({out.data_ptr(): "out", sums.data_ptr(): "sums"})
    attend_gradient(gradient, *states, out, sums, tiling, into=into)
    alive.extend((made, of_made, gradient, out, sums))


def main() -> None:
    driver.set_active(Driver())
    asked, run = [], JITFunction.run
    JITFunction.run = lambda *given, **named: asked.append(len(seen)) or run(*given, **named)
    position = torch.zeros(1, HEADS, TOKENS, 48, dtype=torch.bfloat16)
    tiling = Tiling.of([Span(1, TOKENS, TOKENS, position)], torch.device("cpu"), heads=HEADS, d=D, scale=1.0)
    tensors.update({tiling.query_tiles.data_ptr(): "query tiles", tiling.key_tiles.data_ptr(): "key tiles"})
    for begin in (0, 0, 1):
        layer(tiling, begin)
    for number, launch in enumerate(seen):
        print(json.dumps(launch | {"asked": number in asked}))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
