"""The backend for GPUs: on what grid the kernels of kernels.py run, with which buffers and which numbers.

Symbols: M particles, D numbers in a particle.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmtpt_ds.triton_support import is_interpreted, power_of_two, why_no_kernels

from .backend import Diagnostics, KernelOptions, State, Update
from .reference import Direction

_LOGGER = logging.getLogger(__name__)
MOST_PARTICLES = 32
_NARROWEST = 128  # columns of a tile: what a warp loads at once
# the largest tile whose theta, scores and moments stay in registers across the barrier, 32 numbers of each a thread
_HELD_PARTICLES, _HELD_COLUMNS = 5, 1024
_TILE = 4096  # numbers of a tile that does not
# One program a multiprocessor: it may have all registers; left to itself ptxas stops at 128 and spills, to make room
# for a second. And fused multiply-adds: Triton's default changes with its version.
COMPILER = {"maxnreg": 255, "enable_fp_fusion": True}
_CHUNK = 4096  # numbers of the partial sums that a program adds up at once
_INTERPRETED_PROGRAMS = 3  # a stand-in for the multiprocessors that a CPU does not have


def why_not(particles: Tensor) -> str | None:
    """What keeps these particles from this backend; None if nothing does."""
    if particles.dtype != torch.float32:
        return f"particles are {str(particles.dtype).removeprefix('torch.')}, not float32"
    if len(particles) > MOST_PARTICLES:
        return f"there are {len(particles)} particles, more than {MOST_PARTICLES}"
    if not particles.is_contiguous():
        return "particles are not contiguous"
    return why_no_kernels(particles.device)


class Grid(NamedTuple):
    """How D columns are dealt to programs."""

    programs: int
    block: int  # columns of a tile
    tiles: int  # of a program
    held: bool  # whether a program keeps its tile in registers: the inputs are then read once
    warps: int

    @classmethod
    def plan(cls, M: int, D: int, most: int, *, hold: bool = True, block: int | None = None) -> "Grid":
        """At most `most` programs. Narrow tiles where there are few columns, so that all multiprocessors get some."""
        rows = power_of_two(M)
        hold = hold and M <= _HELD_PARTICLES and math.ceil(D / most) <= _HELD_COLUMNS
        if block is None:
            block = _HELD_COLUMNS if hold else max(_NARROWEST, _TILE // max(rows, 4))
            while block > _NARROWEST and math.ceil(D / (block // 2)) <= most:
                block //= 2
        programs = min(most, math.ceil(D / block))
        tiles = math.ceil(D / (block * programs))
        held = hold and tiles == 1 and block <= _HELD_COLUMNS
        # a warp's columns side by side: then each thread has whole columns, and a row is found without its neighbours
        warps = block // _NARROWEST if held else min(8, max(block // _NARROWEST, rows * block // 512))
        return cls(programs, block, tiles, held, warps)


class Workspace:
    """Buffers of the launches on one set of particles, and the views that a step returns."""

    def __init__(self, M: int, programs: int, device: torch.device, skipped: Tensor):
        slots = _slots(M)
        self.sync = torch.zeros(3, dtype=torch.int64, device=device)
        self.partials, self.kernel = torch.zeros(2, programs, slots, device=device)
        self.norms = torch.zeros(programs, 2, device=device)
        self.report = torch.zeros(5, device=device)
        self.diagnostics = Diagnostics(*self.report.unbind(), skipped)
        self.epoch = 0  # launches so far
        self.one_launch = True  # until the driver refuses

    def serves(self, M: int, programs: int, skipped: Tensor) -> bool:
        return self.partials.shape == (programs, _slots(M)) and self.diagnostics.skipped is skipped


@dataclass(frozen=True)
class Fused:
    """One launch a step where the device can start a whole grid at once, else two."""

    programs: int | None = None  # at most; None: one a multiprocessor
    block: int | None = None  # columns of a tile, a power of two from 128; None: as registers allow
    one_launch: bool = True

    def direction(self, particles: Tensor, scores: Tensor, options: KernelOptions) -> Direction:
        M = len(particles)
        grid = self._grid(particles)
        workspace = Workspace(M, grid.programs, particles.device, particles.new_zeros(()))
        out, matrix = torch.empty_like(particles), particles.new_empty(M, M)
        arguments = kernel_arguments(particles, scores, workspace, grid, options, None, out_ptr=out, matrix_ptr=matrix)
        self._launch(grid, workspace, arguments)
        h, lam, _, drive, repulsion, _ = workspace.diagnostics
        return Direction(out, matrix, h, lam, drive, repulsion)

    def step_(
        self, particles: Tensor, scores: Tensor, state: dict[str, Tensor], options: KernelOptions, update: Update
    ) -> Diagnostics:
        grid = self._grid(particles)
        workspace = getattr(state, "workspace", None)
        if workspace is None or not workspace.serves(len(particles), grid.programs, state["skipped"]):
            workspace = Workspace(len(particles), grid.programs, particles.device, state["skipped"])
            if isinstance(state, State):
                state.workspace = workspace
        tensors = {f"{name}_ptr": tensor for name, tensor in state.items()}
        self._launch(grid, workspace, kernel_arguments(particles, scores, workspace, grid, options, update, **tensors))
        return workspace.diagnostics

    def describe(self, particles: Tensor) -> str:
        grid = self._grid(particles)
        launches = "one launch" if self._fuses(grid) else "two launches"
        where = "the interpreter" if is_interpreted() else torch.cuda.get_device_name(particles.device)
        return f"triton, {launches} of {grid.programs} programs on {where}"

    def _grid(self, particles: Tensor) -> Grid:
        M, D = particles.shape
        most = self.programs or _INTERPRETED_PROGRAMS
        if not is_interpreted():
            multiprocessors = torch.cuda.get_device_properties(particles.device).multi_processor_count
            most = self.programs or multiprocessors
            if most > multiprocessors:
                raise ValueError(f"programs must be at most {multiprocessors}, one a multiprocessor, not {most}")
        return Grid.plan(M, D, most, hold=self.one_launch, block=self.block)

    def _fuses(self, grid: Grid) -> bool:
        """The interpreter runs programs one after another: the first would wait for ever for the second."""
        return self.one_launch and (grid.programs == 1 or not is_interpreted())

    def _launch(self, grid: Grid, workspace: Workspace, arguments: dict[str, Any]) -> None:
        from . import kernels  # here, for triton is not everywhere

        interpreted, on = is_interpreted(), (grid.programs,)
        native = {} if interpreted else {"num_warps": grid.warps, **COMPILER}
        with torch.cuda.device_of(arguments["theta_ptr"]):
            if self._fuses(grid) and workspace.one_launch:
                cooperative = {} if interpreted else {"launch_cooperative_grid": True}
                try:
                    kernels.step_kernel[on](**arguments, HELD=grid.held, FUSED=True, **native, **cooperative)
                    return
                except RuntimeError as error:
                    if "cooperative" not in str(error) and "not supported" not in str(error):
                        raise
                    # nothing has run; another process may hold a part of the GPU
                    workspace.one_launch = False
                    _LOGGER.warning("SVGD takes two launches a step: the GPU refuses a cooperative one (%s)", error)
            first = {name: arguments[name] for name in kernels.distances_kernel.arg_names}
            kernels.distances_kernel[on](**first, **native)
            kernels.step_kernel[on](**arguments, HELD=False, FUSED=False, **native)


def kernel_arguments(
    particles: Tensor,
    scores: Tensor,
    workspace: Workspace,
    grid: Grid,
    options: KernelOptions,
    update: Update | None,
    **tensors: Tensor,
) -> dict[str, Any]:
    """What step_kernel takes, by name, but for HELD and FUSED.

    Args:
        update: None for the direction alone.
        tensors: the state's, or those that the direction goes to.
    """
    M, D = particles.shape
    workspace.epoch += 1
    if scores.dtype not in (torch.float32, torch.bfloat16):
        scores = scores.float()
    absent = ("out", "matrix", "exp_avg", "exp_avg_sq", "step", "skipped")
    return {
        "theta_ptr": particles,
        "score_ptr": scores.contiguous(),
        **{f"{name}_ptr": None for name in absent},
        **tensors,
        "sync_ptr": workspace.sync,
        "partial_ptr": workspace.partials,
        "kernel_ptr": workspace.kernel,
        "norm_ptr": workspace.norms,
        "report_ptr": workspace.report,
        "epoch": workspace.epoch,
        "D": D,
        "count": M,
        "M": M,
        "ROWS": power_of_two(M),
        "BLOCK": grid.block,
        "GRID": grid.programs,
        "TILES": grid.tiles,
        "PAIRS": M * (M - 1) // 2,
        "SLOTS": _slots(M),
        "CHUNK": max(1, min(_CHUNK // _slots(M), power_of_two(grid.programs))),
        **_kernel_numbers(options, M, D),
        **_update_numbers(update),
    }


def _kernel_numbers(options: KernelOptions, M: int, D: int) -> dict[str, Any]:
    """Bandwidth, damping and repulsion as the kernels take them; `paper` and `none` are numbers known beforehand."""
    bandwidth, damping, repulsion_scale = options
    log = 1 / math.log(M + 1)
    known = {"median_log": ("median", log), "median": ("median", 1.0), "printed": ("squared", log)}
    mode, factor = known[bandwidth] if isinstance(bandwidth, str) else ("fixed", bandwidth)
    lambdas = {"paper": min(1.0, math.exp(-1) * (1 + M / D)), "none": 1.0, "matched": 0.0}
    return {
        "BANDWIDTH": mode,
        "bandwidth": float(factor),
        "MATCHED": damping == "matched",
        "damping": float(lambdas[damping] if isinstance(damping, str) else damping),
        "repulsion_scale": float(repulsion_scale),
    }


def _update_numbers(update: Update | None) -> dict[str, Any]:
    """The optimizer's as the kernels take them. Floats always: Triton compiles anew for an integer."""
    optimizer = "none" if update is None else "adam" if update.adaptive else "sgd"
    update = update or Update(False, 0.0, (0.0, 0.0), 0.0, 0.0, None)
    beta1, beta2 = update.betas
    on_device = isinstance(update.lr, Tensor) and update.lr.is_cuda
    return {
        "OPTIMIZER": optimizer,
        "CLIP": update.clip_norm is not None,
        "clip_norm": float(update.clip_norm or 0.0),
        "score_scale": float(update.score_scale),
        "LR_ON_DEVICE": on_device,
        "lr": update.lr if on_device else float(update.lr),
        "weight_decay": float(update.weight_decay),
        "weight1": 1.0 - beta1,
        "log_beta1": _log(beta1),
        "beta2": float(beta2),
        "weight2": 1.0 - beta2,
        "log_beta2": _log(beta2),
        "eps": float(update.eps),
    }


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _slots(M: int) -> int:
    return power_of_two(M * (M - 1) // 2 + 2)
