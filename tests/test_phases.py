"""Seconds by phase: means over steps, and each step by itself."""

import time

import pytest
import torch

from bmtpt_ds.phases import Phases


def steps(phases: Phases) -> None:
    for n in range(3):
        with phases("forward"):
            time.sleep(0.01)
        for _ in range(n):
            with phases("backward"):
                time.sleep(0.01)
        time.sleep(0.005)
        phases.count_step()


def test_each_step_by_itself() -> None:
    phases = Phases(torch.device("cpu"))
    steps(phases)
    each = phases.take_each()
    assert [set(step) for step in each] == [{"step", "forward"}] + 2 * [{"step", "forward", "backward"}]
    for n, step in enumerate(each):
        assert step["forward"] >= 0.01
        assert step.get("backward", 0.0) >= 0.01 * n
        assert step["step"] >= step["forward"] + step.get("backward", 0.0) + 0.005
    assert phases.take_each() == []


def test_means_are_of_the_same_seconds() -> None:
    phases = Phases(torch.device("cpu"))
    steps(phases)
    means = phases.take()
    assert set(means) == {"seconds", "seconds_forward", "seconds_backward"}
    assert means["seconds_backward"] >= 0.01  # 0, 1 and 2 times
    assert means["seconds"] >= means["seconds_forward"] + means["seconds_backward"]
    assert phases.take().keys() == {"seconds"}


def test_pauses_count_for_no_step() -> None:
    phases = Phases(torch.device("cpu"))
    with phases.paused():
        time.sleep(0.05)
    phases.count_step()
    assert phases.take()["seconds"] < 0.04


def test_a_phase_that_fails_counts_too() -> None:
    phases = Phases(torch.device("cpu"))
    with pytest.raises(ValueError), phases("forward"):
        raise ValueError
    phases.count_step()
    assert "forward" in phases.take_each()[0]
