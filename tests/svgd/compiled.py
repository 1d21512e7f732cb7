"""Compiles the kernels for a GPU that need not be there, and prints what became of each as a line of JSON.

    python -m tests.svgd.compiled CAPABILITY {M,D[,OPTIMIZER] | variants} ...

For each case: seconds, registers a thread, bytes of stack and local memory (what spills goes there), how often the PTX
has each ordering of the barrier, and float atomics. `variants` are all that the options make of one size.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as NVIDIA
from triton.compiler import ASTSource

from bmtpt_ds.svgd import fused, init_state, kernels
from bmtpt_ds.svgd.backend import KernelOptions, Update

MULTIPROCESSORS = 132  # of an H100 or H200
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


OPTIONS = KernelOptions("median_log", "matched", 1.0)
VARIANTS = (
    *({"options": KernelOptions(bandwidth, "paper", 1.0)} for bandwidth in ("median", "printed", 2.0)),
    {"clip_norm": None},
    {"scores": torch.bfloat16},
    {"lr": torch.tensor(0.3)},
    {"optimizer": "none"},
    {"optimizer": "none", "one_launch": False},
)


def main() -> None:
    capability, *cases = sys.argv[1:]
    for case in cases:
        if case == "variants":
            for variant in VARIANTS:
                compile_step(int(capability), 5, 5000, **variant)
            compile_distances(int(capability), 5, 5000)
            continue
        M, D, *optimizer = case.split(",")
        for one_launch in (True, False):
            compile_step(int(capability), int(M), int(D), *optimizer, one_launch=one_launch)


def compile_step(
    capability: int, M: int, D: int, optimizer: str = "adamw", *, one_launch: bool = True, **variant
) -> None:
    """step_kernel as `Fused` would launch it on particles [M, D]; `optimizer` "none" for the direction alone."""
    arguments, grid = step_arguments(M, D, optimizer, one_launch, **variant)
    report(kernels.step_kernel, arguments, capability, grid, {"optimizer": optimizer, "one_launch": one_launch})


def compile_distances(capability: int, M: int, D: int) -> None:
    arguments, grid = step_arguments(M, D, "adamw", False)
    report(kernels.distances_kernel, arguments, capability, grid, {"one_launch": False})


def step_arguments(
    M: int,
    D: int,
    optimizer: str,
    one_launch: bool,
    options: KernelOptions = OPTIONS,
    clip_norm: float | None = 1.0,
    scores: torch.dtype = torch.float32,
    lr: float | torch.Tensor = 0.3,
) -> tuple[dict, fused.Grid]:
    particles = torch.zeros(M, D)
    grid = fused.Grid.plan(M, D, MULTIPROCESSORS, hold=one_launch)
    if optimizer == "none":
        update, tensors, skipped = None, {"out_ptr": particles, "matrix_ptr": particles}, particles
    else:
        state = init_state(particles, optimizer)
        update = Update(optimizer != "sgd", 0.3, (0.9, 0.999), 1e-8, 0.01, clip_norm)
        tensors, skipped = {f"{name}_ptr": tensor for name, tensor in state.items()}, state["skipped"]
    workspace = fused.Workspace(M, grid.programs, particles.device, skipped)
    arguments = fused.kernel_arguments(particles, particles.to(scores), workspace, grid, options, update, **tensors)
    if isinstance(lr, torch.Tensor):  # as one on the GPU would be handed on
        arguments |= {"lr": lr, "LR_ON_DEVICE": True}
    return arguments | {"HELD": grid.held and one_launch, "FUSED": one_launch}, grid


def report(kernel, arguments: dict, capability: int, grid: fused.Grid, case: dict) -> None:
    began = time.perf_counter()
    binary = triton.compile(
        source_of(kernel, arguments),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": grid.warps,
            "launch_cooperative_grid": arguments["FUSED"],
            **fused.COMPILER,
        },
    )
    line = {
        "kernel": kernel.__name__,
        "M": arguments["M"],
        "D": arguments["D"],
        **case,
        **grid._asdict(),
        "seconds": round(time.perf_counter() - began, 2),
        **resources(binary.asm["cubin"]),
        **barrier(binary.asm["ptx"]),
    }
    print(json.dumps(line), flush=True)


def source_of(kernel, arguments: dict) -> ASTSource:
    """As a launch with these arguments would specialise it."""
    signature, constants, aligned = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[(position,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, aligned)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack and of local memory: what spills goes there."""
    tool = Path(NVIDIA).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    return {name.lower(): int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED", "LOCAL")}


def barrier(ptx: str) -> dict[str, int]:
    """How often the PTX has each ordering of an access to memory, and atomics on floating-point numbers."""
    accesses = re.findall(r"\b(?:ld|st|atom|red)\.\S+", ptx)
    found = {order: sum(f".{order}." in a for a in accesses) for order in ("release", "acquire", "acq_rel")}
    float_atomics = [a for a in accesses if a.startswith(("atom", "red")) and re.search(r"\.b?f\d", a)]
    return found | {"float_atomics": len(float_atomics)}


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
