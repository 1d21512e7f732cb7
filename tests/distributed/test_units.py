"""T5's blocks under ZeRO-3 on two ranks: gathered in one piece when their turn comes, gone when it is over.

The worker (`units_worker.py`) makes the passes on the ranks.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from bmtpt_ds.config import deepspeed_json
from bmtpt_ds.model_folder import read_architecture
from bmtpt_ds.parallel.building import settled
from tests import launch, toy

WORKER = launch.ROOT / "tests/distributed/units_worker.py"
RANKS, BLOCKS = 2, 3  # blocks of each stack
SIZES = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": BLOCKS, "num_heads": 4}


class Case(NamedTuple):
    settings: dict  # of the JSON's zero_optimization
    gathers: tuple[int, int]  # of the encoder's blocks and of the decoder's in a step
    greatest: int  # blocks there at once, at most; so many of the decoder's are also reached
    recompute: bool = False


def cases(encoder: int, decoder: int, embedding: int) -> dict[str, Case]:
    """Of blocks of those sizes."""
    both, most = (2 * BLOCKS, 2 * BLOCKS - 1), "stage3_max_live_parameters"
    return {
        "auto": Case({}, both, 2),
        "recomputed": Case({}, both, 2, recompute=True),
        "a bucket smaller than a block": Case({"stage3_prefetch_bucket_size": 1}, both, 2),
        "nothing ahead": Case({"stage3_prefetch_bucket_size": 0}, both, 1),
        "nothing kept": Case({"stage3_max_reuse_distance": 0}, (2 * BLOCKS, 2 * BLOCKS), 2),
        "little room": Case({most: decoder + embedding}, both, 1),
        "two ahead": Case({"stage3_prefetch_bucket_size": 2 * decoder, most: 3 * decoder + embedding}, both, 3),
        "two wait": Case({"stage3_max_reuse_distance": 2 * decoder}, (2 * BLOCKS, 2 * BLOCKS - 2), 2),
        "broken off": Case({}, both, 2),
        "on the computation's stream": Case({"overlap_comm": False}, both, 2),
    }


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int, int]:
    """A model; the numbers of an encoder block's matrices, a decoder block's, the embedding's."""
    folder = tmp_path_factory.mktemp("units") / "model"
    toy.write_model(folder, own_head=False, **SIZES)
    architecture = read_architecture(folder)
    return folder, architecture.block_sizes[0], architecture.block_sizes[-1], architecture.embedding_parameters


@pytest.fixture(scope="module")
def seen(sizes: tuple[Path, int, int, int]) -> list[dict]:
    model, *numbers = sizes
    zero = deepspeed_json.load("zero3")["zero_optimization"]
    asked = {
        name: ({"zero_optimization": zero | case.settings}, case.recompute) for name, case in cases(*numbers).items()
    }
    (model.parent / "cases.json").write_text(json.dumps({"model": str(model), "cases": asked}))
    launch.run(launch.forked(RANKS, WORKER, model.parent), model.parent / "log")
    return [json.loads((model.parent / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


ALL = pytest.mark.parametrize("name", cases(1, 1, 1))


@ALL
def test_each_block_is_gathered_there_and_back_unless_it_waits(seen, sizes, name: str) -> None:
    """A rank sends its half, four bytes a number."""
    _, encoder, decoder, embedding = sizes
    expected = cases(encoder, decoder, embedding)[name].gathers
    for rank in seen:
        for sent in rank[name]["gathers"]:
            assert (sent.count(2 * encoder), sent.count(2 * decoder)) == expected


@ALL
def test_no_more_is_there_than_the_json_allows(seen, sizes, name: str) -> None:
    _, encoder, decoder, embedding = sizes
    most = cases(encoder, decoder, embedding)[name].greatest
    for rank in seen:
        assert rank[name]["greatest"] == most * decoder


@ALL
def test_nothing_of_the_blocks_stays_after_a_step(seen, name: str) -> None:
    for rank in seen:
        assert rank[name]["between"] == [0, 0, 0]


@ALL
def test_autograd_keeps_no_view_of_what_a_block_lets_go(seen, name: str) -> None:
    for rank in seen:
        assert rank[name]["outliving"] == []


@ALL
def test_the_gradient_is_the_resident_models(seen, name: str) -> None:
    for rank in seen:
        assert max(rank[name]["differs"]) < 1e-5


def test_a_block_gathered_in_vain_is_let_go(seen, sizes) -> None:
    _, _, decoder, _ = sizes
    for rank in seen:
        assert rank["broken off"]["broken off"] == [decoder, decoder]
        assert rank["broken off"]["without gradient"] == 0


def test_deepspeed_is_not_told_to_do_it_too() -> None:
    zero = {"stage": 3, "leaf_module": {"classes": ["T5Block"]}, "stage3_module_granularity_threshold": 10}
    ds = {"zero_optimization": zero | {"memory_efficient_linear": True}, "bf16": {"enabled": False}}
    deepspeed_json.check(ds, dtype="float32", source="my.json")
    expected = {"stage": 3, "memory_efficient_linear": False}
    assert settled(ds) == {"zero_optimization": expected, "bf16": {"enabled": False}}
