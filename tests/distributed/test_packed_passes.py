"""Passes over tables on two ranks: the gradients of transformers' layers, however the weights lie.

The worker (`packed_worker.py`) makes the steps on the ranks, its kernels by Triton's interpreter.
"""

import json

import pytest

pytest.importorskip("triton")

from bmtpt_ds.config import deepspeed_json
from tests import launch, toy

WORKER = launch.ROOT / "tests/distributed/packed_worker.py"
RANKS = 2
SIZES = {"vocab_size": 96, "d_model": 16, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 1}
NOTHING_STAYS = deepspeed_json.load("zero3_cpu")["zero_optimization"] | {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}
CASES = {  # the JSON, what else it says, whether activations are recomputed
    "resident": ("resident", {}, False),
    "ZeRO-3": ("zero3_cpu", {"zero_optimization": NOTHING_STAYS}, False),
    "recomputed by DeepSpeed": ("zero3_cpu", {"activation_checkpointing": {"partition_activations": False}}, True),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("packed")
    toy.write_model(folder / "model", own_head=False, **SIZES)
    asked = {name: (deepspeed_json.load(ds) | more, recompute) for name, (ds, more, recompute) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps({"model": str(folder / "model"), "cases": asked}))
    launch.run(launch.forked(RANKS, WORKER, folder), folder / "log")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_layers(seen: list[dict], case: str) -> None:
    for rank in seen:
        assert rank[case]["packed"] == 3
        assert max(rank[case]["errors"]) < 1e-5


def test_to_prepare_a_step_gathers_nothing(seen: list[dict]) -> None:
    """It is done while another one runs, in a thread: the other rank would wait for ever, or get something else."""
    for rank in seen:
        alone, meanwhile = rank["ZeRO-3"]["gathers"]
        assert alone
        assert meanwhile == alone
