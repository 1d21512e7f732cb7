"""The fused kernel's programs at the same time, without a GPU: a process for each, the interpreter in all of them.

They meet at the kernel's own barrier, in memory that they share. On a GPU tests/gpu does without this.
"""

import pytest
import torch
import torch.multiprocessing as mp

from bmtpt_ds.svgd import init_state, svgd_step_
from bmtpt_ds.svgd.backend import KernelOptions, Update
from bmtpt_ds.svgd.fused import Grid, Workspace, kernel_arguments
from bmtpt_ds.triton_support import is_interpreted

pytest.importorskip("triton")
if not is_interpreted():
    pytest.skip("there is a GPU here: the kernels are compiled", allow_module_level=True)

EPOCHS = (1, 3, 2)  # the last one as a captured step is replayed: with the epoch that it was captured with
SECONDS = 120  # for processes that start, import and take three steps


def run_program(program: int, launches: list[dict], held: bool, together) -> None:
    """Runs one program of every launch; `together` keeps launches apart, as a GPU's queue does."""
    from triton.runtime import interpreter

    from bmtpt_ds.svgd import kernels

    # the tensors are shared, so there is nothing to copy back, and it would undo what others have written meanwhile
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    builder = interpreter.interpreter_builder
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (program, 0, 0))
    for arguments in launches:
        together.wait(SECONDS)
        kernels.step_kernel[(1,)](**arguments, HELD=held, FUSED=True)


@pytest.mark.parametrize(
    ("M", "D", "programs", "held", "optimizer"),
    [(5, 330, 3, True, "adamw"), (2, 250, 2, True, "sgd"), (6, 700, 3, False, "adamw"), (10, 200, 2, False, "sgd")],
)
def test_programs_that_run_at_once_make_the_references_step(M, D, programs, held, optimizer):
    generator = torch.Generator().manual_seed(M)
    theta, score = (torch.randn(M, D, generator=generator) for _ in range(2))
    expected, expected_state = theta.clone(), init_state(theta, optimizer)
    state = init_state(theta, optimizer)
    grid = Grid.plan(M, D, programs)
    assert (grid.programs, grid.held) == (programs, held)
    workspace = Workspace(M, programs, theta.device, state["skipped"])
    tensors = {f"{name}_ptr": tensor for name, tensor in state.items()}
    options, update = (
        KernelOptions("median_log", "paper", 1.0),
        Update(optimizer != "sgd", 0.3, (0.9, 0.999), 1e-8, 0.1, 1.0),
    )
    launches = [kernel_arguments(theta, score, workspace, grid, options, update, **tensors) for _ in EPOCHS]
    for arguments, epoch in zip(launches, EPOCHS, strict=True):
        arguments["epoch"] = epoch
    for argument in launches[0].values():
        if isinstance(argument, torch.Tensor):
            argument.share_memory_()

    context = mp.get_context("forkserver")  # torch and Triton are imported once
    context.set_forkserver_preload(["bmtpt_ds.svgd.kernels"])
    together = context.Barrier(programs)
    processes = [
        context.Process(target=run_program, args=(program, launches, held, together), daemon=True)
        for program in range(programs)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
        assert [process.exitcode for process in processes] == [0] * programs
    finally:
        for process in processes:
            process.kill()

    for _ in EPOCHS:
        right = svgd_step_(
            expected, score, expected_state, optimizer=optimizer, lr=0.3, weight_decay=0.1, clip_norm=1.0
        )
    assert (theta - expected).norm() < 1e-5 * expected.norm()
    assert state["step"] == len(EPOCHS)
    assert state["skipped"] == 0
    assert workspace.sync[2] == sum(EPOCHS)
    for found, value in zip(workspace.report, right, strict=False):
        assert found.item() == pytest.approx(value.item(), rel=1e-5)
