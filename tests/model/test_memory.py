"""`activation_checkpointing: auto`: activations are recomputed where keeping them would starve the micro-batches."""

import copy
from dataclasses import replace

import pytest

from bmtpt_ds.config import load_recipe
from bmtpt_ds.model.memory import Live, Share, choose
from bmtpt_ds.session import open_session
from bmtpt_ds.stage_inputs import source_tasks
from bmtpt_ds.stopping import StopSignal

GB = 10**9
ROW = GB  # bytes that the longest row keeps
SHARE = Share(rows=30, row_tokens=400)


def recomputes(memory: float, share: Share = SHARE, *, gathered: bool) -> bool:
    return choose(share, row_bytes=ROW, memory=int(memory), gathered=gathered).recompute


@pytest.mark.parametrize("gathered", [False, True])
def test_what_fits_at_once_is_kept_and_what_does_not_fit_at_all_is_recomputed(gathered: bool) -> None:
    assert not recomputes(30 * GB, gathered=gathered)
    assert recomputes(0.9 * GB, gathered=gathered)
    assert recomputes(0, gathered=gathered)


def test_resident_weights_make_do_with_small_micro_batches() -> None:
    assert not recomputes(1 * GB, gathered=False)


def test_gathered_weights_need_micro_batches_that_take_longer_than_the_gather() -> None:
    enough = 6  # rows of 400 tokens: more than 2048
    assert recomputes((enough - 1) * GB, gathered=True)
    assert not recomputes(enough * GB, gathered=True)
    assert not recomputes(enough * GB, Share(rows=10**6, row_tokens=400), gathered=True)
    assert recomputes(enough * GB, Share(rows=30, row_tokens=40), gathered=True)


def test_few_rows_that_fit_are_kept_however_short() -> None:
    assert not recomputes(2 * GB, Share(rows=2, row_tokens=40), gathered=True)


def test_micro_batches_that_the_recipe_bounds_need_no_more_than_that() -> None:
    bounded = replace(SHARE, micro_batch=900)
    assert bounded.rows_at_once == 2
    assert not recomputes(2 * GB, bounded, gathered=True)
    assert recomputes(1.9 * GB, bounded, gathered=True)
    assert replace(SHARE, micro_batch=10).rows_at_once == 1  # a row is never cut


def test_the_choice_says_why() -> None:
    kept = choose(SHARE, row_bytes=ROW, memory=40 * GB, gathered=True)
    assert str(kept) == "activations kept: a micro-batch of 30 rows fits"
    short = choose(SHARE, row_bytes=ROW, memory=3 * GB, gathered=True)
    assert str(short).startswith("activations recomputed: 3 of 30 rows fit at once otherwise, too few")


@pytest.mark.parametrize(
    ("asked", "section", "cells", "says"),
    [
        ("auto", None, 4, "activations kept: a micro-batch of 4 rows fits"),
        ("auto", {"partition_activations": False}, 4, "activations recomputed, as the DeepSpeed JSON says"),
        (True, None, 4, "activations recomputed, as the recipe says"),
        (False, {"partition_activations": False}, 4, "activations kept, as the recipe says"),
        ("auto", None, 0, ""),
    ],
)
def test_a_session_does_as_it_is_told_and_says_so(loaded, recipe, asked, section, cells, says) -> None:

    own = load_recipe(str(recipe), [f"model.activation_checkpointing={str(asked).lower()}"])
    ds = {"activation_checkpointing": section} if section else {}
    session = open_session(own, loaded.ranks, ds, cells or 1, StopSignal(), source_tasks(own) if cells else ())
    assert session.model.backbone.checkpoints_activations == ("recomputed" in says)
    assert session.activations == says


def test_a_step_that_does_not_fit_is_recomputed(loaded) -> None:
    """More tokens in a row than any machine holds."""
    model = replace(loaded, backbone=copy.deepcopy(loaded.backbone))
    assert not model.choose_checkpointing(4, 10, "auto").recompute
    assert not model.backbone.checkpoints_activations
    assert model.choose_checkpointing(4, 10**9, "auto").recompute
    assert model.backbone.checkpoints_activations


@pytest.mark.parametrize(
    ("blocks", "reuse", "kept"),
    [(100, 100, 4), (100, 30, 3), (100, 29, 2), (10, 100, 1), (9, 100, 0), (100, 0, 0)],
)
def test_the_last_blocks_wait_for_their_backward_pass_as_far_as_there_is_room(blocks, reuse, kept) -> None:
    assert Live(blocks, ahead=0, reuse=reuse).kept([7, 10, 10, 10]) == kept
