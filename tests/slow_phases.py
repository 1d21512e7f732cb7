"""A sleep in one phase of a step, for tests of what a profile says."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bmtpt_ds import source, target
from bmtpt_ds.adaptation.prior import Prior
from bmtpt_ds.data.ahead import Ahead
from bmtpt_ds.model.backbone import Backbone
from bmtpt_ds.parallel import Grid, Ranks

SLEEP = 0.15  # seconds; half of it is more than a busy machine adds to a phase of milliseconds
PLACES = {  # what is called once in the phase; `broadcast` is three times in the target stage
    "data": (Ahead, "take"),
    "forward": (Backbone, "row_losses"),
    "backward": (torch.Tensor, "backward"),
    "gather": (Grid, "combine"),
    "svgd": (source, "svgd_step_"),
    "broadcast": (Ranks, "broadcast_"),
    "prior": (Prior, "negative_log"),
    "update": (target, "_step"),
}


AS_IT_IS = "as it is"  # no phase


@contextmanager
def asleep(phase: str) -> Iterator[None]:
    """Inside, that phase takes so much longer."""
    if phase == AS_IT_IS:
        yield
        return
    owner, name = PLACES[phase]
    original = getattr(owner, name)

    def slow(*arguments, **named):
        time.sleep(SLEEP)
        return original(*arguments, **named)

    setattr(owner, name, slow)
    try:
        yield
    finally:
        setattr(owner, name, original)


def only_slow(profile: dict, usual: dict, phase: str) -> None:
    """Asserts that the sleep stands in that phase and in no other, wherever the stages have it.

    Args:
        usual: a profile without a sleep.
    """
    seen = 0
    for name, stage in profile["stages"].items():
        seconds, before = stage["seconds"], usual["stages"][name]["seconds"]
        if phase not in seconds:
            continue
        seen += 1
        assert seconds[phase]["median"] >= SLEEP, seconds
        # the fastest steps: another process may have had the machine for some
        more = {other: seconds[other]["low"] - before[other]["low"] for other in seconds}
        assert max(more[other] for other in seconds if other not in (phase, "step")) < SLEEP / 2, more
        assert seconds["step"]["median"] >= SLEEP
    assert seen
