"""The DeepSpeed JSON: what ships is accepted by DeepSpeed itself, and every refusal names the key in one line."""

import copy
import json
import re
from pathlib import Path

import pytest

from bmtpt_ds.config import deepspeed_json
from bmtpt_ds.config.deepspeed_keys import KEYS
from bmtpt_ds.errors import UserError
from bmtpt_ds.model_folder import Architecture

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "ds_configs").glob("*.json"))
T5 = Architecture(
    hidden_size=512,
    heads=8,
    inner_size=512,
    feed_forward_size=2048,
    gated=False,
    encoder_blocks=6,
    decoder_blocks=6,
    vocab_size=32128,
    position_buckets=32,
    own_head=False,
)
BLOCK = 8 * 512 * 512 + 2 * 512 * 2048  # two attentions, feed-forward
EMBEDDING = 32128 * 512
RUN = {"architecture": T5, "micro_batch": 6, "world": 2, "local_world": 2}


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def check(ds, dtype="float32"):
    deepspeed_json.check(ds, dtype=dtype, source="my.json")


def paths(schema, prefix=""):
    for key, value in schema.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_json_is_accepted_by_deepspeed(name, dtype, monkeypatch):
    config = pytest.importorskip("deepspeed.runtime.config")
    ds = deepspeed_json.load(name)
    deepspeed_json.check(ds, dtype=dtype, source=name)
    resolved = deepspeed_json.resolve(ds, dtype=dtype, **RUN)
    monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(config.dist, "get_world_size", lambda: RUN["world"])
    seen = config.DeepSpeedConfig(resolved)  # asserts the batch keys too
    assert seen.zero_config.stage == deepspeed_json.stage(ds)
    assert seen.bfloat16_config.enabled == (dtype == "bfloat16")
    assert '"auto"' not in json.dumps(resolved)
    if seen.zero_config.stage == 3:
        assert seen.zero_config.prefetch_bucket_size == BLOCK
        assert seen.zero_config.param_persistence_threshold == 5120
        assert seen.zero_config.max_live_parameters == 2 * BLOCK + EMBEDDING


def test_the_situations_ship_and_the_readme_explains_each():
    assert set(SHIPPED) == {"resident", "zero3", "zero3_cpu", "zero3_hpz", "zero3_offload"}
    readme = (Path(__file__).parents[1] / "ds_configs/README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.json`" in readme for name in SHIPPED)


def test_every_honoured_key_is_one_of_deepspeeds():
    """A key that DeepSpeed drops would end in its own traceback: keep the table a subset of what it knows."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import activation_checkpointing, precision_config
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    def names(model):
        return {field.alias or name for name, field in model.model_fields.items()}

    known = KEYS
    assert set(known["zero_optimization"]) <= names(zero.DeepSpeedZeroConfig)
    assert set(known["zero_optimization"]["offload_param"]) == names(DeepSpeedZeroOffloadParamConfig)
    assert set(known["zero_optimization"]["leaf_module"]) == names(zero.DeepSpeedZeroLeafModuleConfig)
    assert set(known["bf16"]) <= names(precision_config.DeepSpeedBF16Config)
    assert set(known["comms_logger"]) == names(CommsLoggerConfig)
    assert set(known["tensorboard"]) == names(TensorBoardConfig)
    assert set(known["csv_monitor"]) == names(CSVConfig)
    assert set(known["wandb"]) == names(WandbConfig)
    assert set(known["activation_checkpointing"]) == set(activation_checkpointing.config.ACT_CHKPT_DEFAULT)


RECIPE_DECIDES = [
    ({"optimizer": {"type": "Adam"}}, "optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
    ({"fp16": {"enabled": True}}, "fp16.enabled"),
    ({"fp16": True}, "fp16"),
    ({"gradient_clipping": 1.0}, "gradient_clipping"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
]
CANNOT_BE = [
    ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
    ({"zero_optimization": True}, "zero_optimization"),
    ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size"),
    ({"zero_optimization": {"stage": 3, "overlap_comm": "auto"}}, "zero_optimization.overlap_comm"),
    ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1.5}}, "stage3_max_live_parameters"),
    ({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param.device"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "zero_optimization.offload_param.device"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.nvme_path"),
    ({"bf16": {"enabled": True}}, "bf16.enabled"),
    ({"bf16": True}, "bf16"),
    ({"tensorboard": []}, "tensorboard"),
    ({"tensorboard": {"enabled": "yes"}}, "tensorboard.enabled"),
    ({"comms_logger": {"prof_ops": [1]}}, "comms_logger.prof_ops"),
    ({"train_batch_size": 0}, "train_batch_size"),
    ({"activation_checkpointing": {"contiguous_memory_optimization": True}}, "contiguous_memory_optimization"),
    ({"communication_data_type": "fp16"}, "communication_data_type"),
    ({"line\nbreak": 1}, "line break"),
]


@pytest.mark.parametrize(("ds", "key"), RECIPE_DECIDES + CANNOT_BE)
def test_refusals_name_file_and_key(ds, key):
    message = refusal(check, ds)
    assert message.startswith("my.json: ")
    assert key in message


def test_bfloat16_recipe_refuses_bf16_switched_off():
    assert "model.dtype is bfloat16" in refusal(check, {"bf16": {"enabled": False}}, "bfloat16")


@pytest.mark.parametrize(
    ("ds", "nearest"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimization"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"tensorbord": {}}, "tensorboard"),
        ({"zero_optimization": {"stage": 3, "max_live_parameters": 1}}, "stage3_max_live_parameters"),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, "offload_param"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(ds, nearest):
    assert f"did you mean {nearest}?" in refusal(check, ds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_off_or_auto_or_missing_passes(dtype):
    ds = {
        "_comment": "anything",
        "optimizer": None,
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"_why": [], "stage": 3, "offload_optimizer": {"device": "none"}, "sub_group_size": 1e9},
        "flops_profiler": {"enabled": False, "module_depth": -1, "recompute_fwd_factor": 0.5, "output_file": None},
    }
    before = copy.deepcopy(ds)
    check(ds, dtype)
    resolved = deepspeed_json.resolve(ds, dtype=dtype, **RUN)
    assert ds == before
    assert resolved == {
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "sub_group_size": 1_000_000_000},
        "flops_profiler": {"enabled": False, "module_depth": -1, "recompute_fwd_factor": 0.5},
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 6,
    }
    assert isinstance(resolved["zero_optimization"]["sub_group_size"], int)


def test_every_auto_is_resolved_and_no_other():
    autos: dict = {}
    for path in deepspeed_json._AUTOS:
        *sections, key = path.split(".")
        section = autos
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = "auto"
    assert set(deepspeed_json._AUTOS) <= set(paths(KEYS))
    check(autos)
    assert deepspeed_json.resolve(autos, dtype="float32", **RUN) == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 0,
            "reduce_bucket_size": 262144,
            "stage3_prefetch_bucket_size": BLOCK,
            "stage3_max_reuse_distance": BLOCK,
            "stage3_max_live_parameters": 2 * BLOCK + EMBEDDING,
            "stage3_param_persistence_threshold": 5120,
            "zero_hpz_partition_size": 1,
        },
    }
    unresolvable = {"zero_optimization": {"stage": 3, "overlap_comm": "auto"}}
    assert "zero_optimization.overlap_comm" in refusal(deepspeed_json.resolve, unresolvable, dtype="float32", **RUN)


@pytest.mark.parametrize(
    "given", [{"train_batch_size": 8}, {"train_micro_batch_size_per_gpu": 2}, {"gradient_accumulation_steps": 2}]
)
def test_batch_keys_must_be_ours(given):
    (key,) = given
    message = refusal(deepspeed_json.resolve, given, dtype="float32", **RUN)
    assert key in message
    assert '"auto"' in message
    deepspeed_json.resolve({"train_batch_size": 12.0}, dtype="float32", **RUN)


def test_hpz_group_divides_the_world():
    ds = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    for world, fits in ((2, True), (8, True), (6, False)):
        run = {"architecture": None, "dtype": "float32", "micro_batch": 1, "world": world, "local_world": world}
        if fits:
            deepspeed_json.resolve(ds, **run)
        else:
            assert "zero_hpz_partition_size is 4" in refusal(deepspeed_json.resolve, ds, **run)


@pytest.mark.parametrize(("world", "local_world", "group"), [(8, 4, 4), (8, 1, 1), (4, 4, 1), (1, 1, 1)])
def test_hpz_auto_is_a_node_where_there_are_several(world: int, local_world: int, group: int):
    ds = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    run = {"architecture": None, "dtype": "float32", "micro_batch": 1, "world": world, "local_world": local_world}
    assert deepspeed_json.resolve(ds, **run)["zero_optimization"]["zero_hpz_partition_size"] == group


def test_stage_of_a_json_that_says_nothing_is_0():
    assert deepspeed_json.stage({}) == 0
    assert deepspeed_json.stage({"zero_optimization": None}) == 0
    assert deepspeed_json.stage({"zero_optimization": {"stage": 3.0}}) == 3


def test_find_takes_paths_and_shipped_stems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_json.find("zero3").name == "zero3.json"
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert deepspeed_json.load("mine.json") == {}
    assert deepspeed_json.find(str(mine)) == mine
    message = refusal(deepspeed_json.find, "zero3_gpu")
    assert "did you mean zero3_cpu?" in message
    assert ", ".join(SHIPPED) in message
    assert "is a folder" in refusal(deepspeed_json.find, str(tmp_path))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('{\n  "bf16": {"enabled": true,}\n}', r"line 2, column \d+"),
        ('{"bf16": {"enabled": true, "enabled": false}}', '"enabled" is written twice'),
        ('{"gradient_clipping": NaN}', "NaN is not JSON"),
        ("[1, 2]", "one object of sections"),
        ("", "line 1, column 1"),
        (b"\xff\xfe{}", "cannot be read"),
    ],
)
def test_broken_files_are_refused_with_their_place(tmp_path, text, pattern):
    broken = tmp_path / "broken.json"
    broken.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(deepspeed_json.load, str(broken))
    assert str(broken) in message
    assert re.search(pattern, message)
