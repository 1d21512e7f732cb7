"""What is made ahead is what would have been made in time."""

import threading

import pytest

from bmtpt_ds.data.ahead import Ahead

LIMIT = 20.0  # seconds


def test_every_step_gets_its_own_and_the_next_is_made_meanwhile() -> None:
    begun = {step: threading.Event() for step in range(1, 5)}

    def make(step: int) -> int:
        begun[step].set()
        return step * step

    with Ahead(make, last=3) as ahead:
        assert ahead.take(1) == 1
        assert begun[2].wait(LIMIT)
        assert not begun[3].is_set()
        assert [ahead.take(2), ahead.take(3)] == [4, 9]
    assert not begun[4].is_set()


def test_any_step_may_be_taken() -> None:
    with Ahead(lambda step: -step, last=100) as ahead:
        assert [ahead.take(step) for step in (7, 8, 3, 4, 50)] == [-7, -8, -3, -4, -50]


def test_an_error_belongs_to_its_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("row 2 is torn")
        return step

    with Ahead(make, last=3) as ahead:
        assert ahead.take(1) == 1
        with pytest.raises(ValueError, match="row 2 is torn"):
            ahead.take(2)
        assert ahead.take(3) == 3


def test_the_thread_ends_with_the_run() -> None:
    with pytest.raises(KeyError), Ahead(lambda step: step, last=100) as ahead:
        ahead.take(1)
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
