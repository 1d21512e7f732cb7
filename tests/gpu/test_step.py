"""The fused step as a run uses it: no allocation, no waiting, no surprise from what else the GPU does."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bmtpt_ds.svgd import choose_backend, init_state, svgd_step_
from bmtpt_ds.svgd.fused import Fused
from tests.benchmarks.svgd_step import launches_of

M, D = 5, 102_400
OPTIONS = {"optimizer": "adamw", "clip_norm": 1.0, "backend": "triton"}


def start():
    generator = torch.Generator("cuda").manual_seed(0)
    theta, score = (torch.randn(M, D, device="cuda", generator=generator) for _ in range(2))
    return 30 * theta, score, init_state(theta, "adamw")


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_it_in_one_launch():
    theta, _, _ = start()
    assert choose_backend(theta).describe(theta).startswith("triton, one launch of 100 programs")


def test_steps_after_the_first_allocate_nothing_and_never_wait():
    theta, score, state = start()
    svgd_step_(theta, score, state, lr=0.3, **OPTIONS)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        for t in range(10):
            svgd_step_(theta, score, state, lr=0.3 / (t + 1), **OPTIONS)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert state["step"] == 11


def test_gradients_become_scores_in_the_same_launch():
    theta, gradient, state = start()

    def step(_) -> None:
        svgd_step_(theta, gradient, state, lr=0.3, score_scale=-2.0, **OPTIONS)

    step(None)  # compiles, and makes the buffers
    launches = launches_of(step, None)
    if launches is None:
        pytest.skip("the profiler sees nothing of this GPU")
    assert launches == 1


def test_a_learning_rate_on_the_device_is_the_same_number():
    ends = []
    for lr in (0.25, torch.tensor(0.25, device="cuda"), torch.tensor(0.25, device="cuda", dtype=torch.float64)):
        theta, score, state = start()
        svgd_step_(theta, score, state, lr=lr, **OPTIONS)
        ends.append(theta)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def walk(steps: int = 50) -> tuple[torch.Tensor, ...]:
    theta, score, state = start()
    for t in range(steps):
        svgd_step_(theta, score * (1 + t % 3), state, lr=0.3, **OPTIONS)
    return theta, *state.values()


def test_the_same_to_the_bit_every_time_whatever_else_the_gpu_does():
    alone = walk()
    beside = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(40):
                busy = (busy @ busy).clamp(-1, 1)
        for one, two in zip(alone, walk(), strict=True):
            assert torch.equal(one, two)
    torch.cuda.synchronize()


def test_a_captured_step_replays():
    theta, score, state = start()
    expected, _, expected_state = start()
    for _ in range(4):
        svgd_step_(expected, score, expected_state, lr=0.3, **OPTIONS)
    svgd_step_(theta, score, state, lr=0.3, **OPTIONS)  # compiles, and makes the buffers
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        svgd_step_(theta, score, state, lr=0.3, **OPTIONS)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert state["step"] == 4
    assert torch.equal(theta, expected)


def test_more_programs_than_multiprocessors_are_refused():
    theta, score, state = start()
    before = theta.clone()
    with pytest.raises(ValueError, match="programs must be at most"):
        svgd_step_(theta, score, state, lr=0.3, backend=Fused(programs=1000))
    assert torch.equal(theta, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # layer by layer, and by CUDA graphs
def test_a_run_waits_for_the_gpu_where_it_logs_and_nowhere_else(runs_on_gpu, dtype):
    """Twenty more steps without a line of the log: not one more place where the host waits."""
    assert runs_on_gpu(dtype, steps=45, log_every=40) == runs_on_gpu(dtype, steps=65, log_every=60)


@pytest.fixture
def runs_on_gpu(tmp_path, recipe):
    from bmtpt_ds import cli

    def waits(dtype: str, steps: int, log_every: int) -> dict[str, int]:
        """How often the host waits in a source run, by place: first step, one logged step, last step."""
        settings = (
            f"model.dtype={dtype}",
            f"source.steps={steps}",
            f"run.log_every={log_every}",
            "run.save_every=1000",
            "run.check_replicas=0",
        )
        arguments = ["source", "--config", str(recipe), "--run-dir", str(tmp_path / f"{dtype}-{steps}")]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                assert cli.main([*arguments, *(a for s in settings for a in ("--set", s))]) in (None, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places: dict[str, int] = {}
        for warning in seen:
            if "synchronizing CUDA operation" in str(warning.message):
                place = f"{warning.filename}:{warning.lineno}"
                places[place] = places.get(place, 0) + 1
        return places

    return waits
