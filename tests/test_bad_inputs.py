"""Mistakes in what a run is given: the recipe, the model, the rows, the DeepSpeed JSON.

A case breaks one thing of a run that would work; it returns the command line and what the one line on stderr must hold.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import toy
from tests.mistakes import Bench, Cases, assert_refused

case = Cases()

# --- the recipe ------------------------------------------------------------------------------------------------------

case.setting("key", "source.stpes=3", "unknown key source.stpes", "did you mean steps?")
case.setting("key_of_svgd", "source.svgd.bandwith=1", "unknown key source.svgd.bandwith", "did you mean bandwidth?")
case.setting("section", "sourec.lr=1", "unknown key sourec", "did you mean source?")
case.setting("set_without_equals", "source.lr", "--set source.lr:", "key=value", "source.lr=0.1")
case.setting("set_not_yaml", "source.tasks=[sst2", "--set source.tasks=[sst2", "not valid YAML")
case.setting("set_impossible_date", "run.seed=2024-13-45", "--set run.seed=2024-13-45", "not valid YAML")
case.setting("set_below_a_number", "run.log_every.x=1", "--set run.log_every.x=1: log_every is not a section")
case.setting("task", "source.tasks=[sst3]", "unknown task 'sst3'", "did you mean sst2?")
case.setting("task_twice", "source.tasks=[sst2, sst2]", "source", "names sst2 more than once")
case.setting("no_source_task", "source.tasks=[]", "source.tasks is empty", "--set source.tasks=[sst2]")
case.setting("float16", "model.dtype=float16", "model.dtype", "'float16'", "'bfloat16'", "fp16")
case.setting("particles_0", "source.particles=0", "source.particles", "greater than or equal to 1", "got 0")
case.setting("steps_true", "source.steps=true", "source", "steps should not be true")
case.setting("tasks_per_step", "source.tasks_per_step=3", "tasks_per_step is 3", "2 source tasks")
case.setting("rows_per_task", "source.rows_per_task=61", "source.rows_per_task of sst2", "at most 60")
case.setting("grid", "source.particle_ranks=3", "source.particle_ranks: 3", "3 particles and the 1 ranks", "give 1")
case.setting("name of a run", "run.name=a/b", "run.name: should be of letters", "rename 'a/b'")
case.setting("lr_negative", "source.lr=-0.1", "source.lr", "greater than 0", "got -0.1")
case.setting("lr_nan", "source.lr=.nan", "source.lr", "finite")
case.setting("lr_nan_text", "source.lr=nan", "source.lr", "finite")
case.setting("warmup", "source.warmup_steps=6", "warmup_steps (6) should be below steps (6)")
case.setting("prompt_length", "prompt.length=94", "prompt.length 94", "93 tokens")
case.setting("sigma", "target.sigma=0", "target.sigma", "greater than or equal to 0.0000000001", "got 0", stage="adapt")
case.setting("shots", "target.shots=61", "target.shots: 61", "give 1 to 60", stage="adapt")
case.setting("shots_0", "target.shots=0", "target.shots", "greater than or equal to 1", "got 0", stage="adapt")
case.setting(
    "two_targets",
    "target.tasks=[mrpc, rte]",
    "target.tasks names 2 tasks",
    "target.tasks=[mrpc]",
    "target.multi=true",
    stage="adapt",
)
case.setting("no_target_task", "target.tasks=[]", "target.tasks is empty", "target.tasks=[", stage="adapt")


@case
def recipe_missing(b: Bench):
    return ["source", "--config", "first_rum", "--run-dir", "run"], ["recipe first_rum", "did you mean first_run?"]


@case
def recipe_not_yaml(b: Bench):
    b.file("recipe.yaml", "model:\n  dtype: [float32\nrun: {}\n")
    return b.source(), ["recipe.yaml, line 3", "not valid YAML"]


@case
def recipe_with_a_control_character(b: Bench):
    b.file("recipe.yaml", "model:\n  dtype: float32\x07\n")
    return b.source(), ["recipe.yaml", "not valid YAML", "#x0007"]


@case
def recipe_of_bytes(b: Bench):
    b.file("recipe.yaml", b"\xff\xfe\x00")
    return b.source(), ["recipe.yaml", "not UTF-8 (byte 1)", "save the file as UTF-8"]


@case
def recipe_is_a_list(b: Bench):
    b.file("recipe.yaml", "- model\n- source\n")
    return b.source(), ["recipe.yaml", "mapping of sections"]


@case
def recipe_key_twice(b: Bench):
    b.file("recipe.yaml", "run: {seed: 1, seed: 2}\n")
    return b.source(), ["recipe.yaml, line 1", "'seed' is given twice"]


# --- the model -------------------------------------------------------------------------------------------------------


@case
def model_missing(b: Bench):
    path = b.folder / "nowhere"
    return b.source("--set", f"model.name_or_path={path}"), [f"model.name_or_path {path}", "no such folder"]


@case
def model_without_config(b: Bench):
    model, named = b.model()
    (model / "config.json").unlink()
    return b.source(*named), [str(model), "no config.json", "T5 checkpoint"]


@case
def model_config_torn(b: Bench):
    model, named = b.model()
    (model / "config.json").write_text('{"model_type": "t5"')
    return b.source(*named), [str(model / "config.json"), "not a valid JSON", "copy the model folder again"]


@case
def model_config_value(b: Bench):
    model, named = b.model()
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"d_model": "32"}))
    return b.source(*named), [str(model / "config.json"), "'d_model' expected int", "copy the model folder again"]


@case
def model_config_of_another_kind(b: Bench):
    model, named = b.model()
    (model / "config.json").write_text("[]")
    return b.source(*named), [str(model / "config.json"), "copy the model folder again"]


@case
def model_is_bert(b: Bench):
    model, named = b.model()
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"model_type": "bert", "architectures": ["BertModel"]}))
    return b.source(*named), [str(model / "config.json"), "model_type is 'bert'", "T5 is needed"]


@case
def model_without_weights(b: Bench):
    model, named = b.model()
    (model / "model.safetensors").unlink()
    return b.source(*named), [str(model), "no model.safetensors and no pytorch_model.bin"]


def change_weights(model: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


NAME = "decoder.block.1.layer.1.EncDecAttention.q.weight"


@case
def model_lacks_a_tensor(b: Bench):
    model, named = b.model()
    change_weights(model, lambda tensors: tensors.pop(NAME))
    return b.source(*named), [str(model), f"lacks {NAME}", "config.json"]


@case
def model_tensor_of_another_shape(b: Bench):
    model, named = b.model()
    change_weights(model, lambda tensors: tensors.update({NAME: tensors[NAME][:16].clone()}))
    return b.source(*named), [str(model), NAME, "(16, 32)", "config.json says (32, 32)"]


@case
def model_shard_truncated(b: Bench):
    model, named = b.model()
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, model / shard, {"format": "pt"})
    places = {name: shard for shard, inside in shards.items() for name in inside}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (model / "model.safetensors").unlink()
    os.truncate(model / "model-2.safetensors", 5000)
    return b.source(*named), [str(model / "model-2.safetensors"), "cannot be read", "copy the model folder again"]


@case
def model_index_of_another_kind(b: Bench):
    model, named = b.model()
    (model / "model.safetensors.index.json").write_text("[]")
    return b.source(*named), [str(model / "model.safetensors.index.json"), "copy the model folder again"]


@case
def model_bin_of_text(b: Bench):
    model, named = b.model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    return b.source(*named), [str(model / "pytorch_model.bin"), "cannot be read", "copy the model folder again"]


@case
def tokenizer_missing(b: Bench):
    model, named = b.model()
    for path in model.glob("tokenizer*"):
        path.unlink()
    return b.source(*named), [str(model), "no tokenizer", "add its tokenizer.json or spiece.model"]


@case
def tokenizer_torn(b: Bench):
    model, named = b.model()
    os.truncate(model / "tokenizer.json", 500)
    return b.source(*named), [str(model), "tokenizer cannot be read", "copy the model folder again"]


@case
def tokenizer_of_another_kind(b: Bench):
    model, named = b.model()
    (model / "tokenizer.json").write_text("{}")
    return b.source(*named), [str(model), "tokenizer cannot be read", "copy the model folder again"]


@case
def tokenizer_of_a_larger_model(b: Bench):
    model, named = b.model()
    toy.make_tokenizer(model, vocab=200)
    return b.source(*named), [str(model), "tokenizer has 200 tokens, the model 96", "the model's own tokenizer"]


# --- the rows --------------------------------------------------------------------------------------------------------


def damaged_rows(name: str, line: str, *expected: str, number: int = 3) -> None:
    """A case that puts `line` in place of a line of cola's training rows."""

    def make(b: Bench):
        root, named = b.data()
        path = root / "cola/train.jsonl"
        lines = path.read_text().splitlines()
        lines[number - 1] = line
        path.write_text("\n".join(lines) + "\n")
        return b.source(*named), [f"{path}:{number}: ", *expected]

    case[name] = make


damaged_rows("column", '{"text": "a", "label": 0}', "column 'sentence' is missing", "'text', 'label'")
damaged_rows("line_torn", '{"sentence": "a", "la', "not valid JSON", "one whole JSON object a line")
damaged_rows("line_torn_in_text", '{"sentence": "a', "not valid JSON (Invalid control character at character 16)")
damaged_rows("line_blank", "", "blank line between rows", "remove it")
damaged_rows("label_range", '{"sentence": "a", "label": 2}', "'label' must be from 0 to 1", "not 2")
damaged_rows("label_minus_1", '{"sentence": "a", "label": -1}', "'label' must be from 0 to 1", "leave them out")
damaged_rows("label_text", '{"sentence": "a", "label": "1"}', "'label' must be an integer from 0 to 1", "not text")


@case
def data_root_missing(b: Bench):
    path = b.folder / "nowhere"
    return b.source("--set", f"data.root={path}"), [f"data.root: {path} does not exist", "sst2/train.jsonl"]


@case
def task_folder_missing(b: Bench):
    root, named = b.data()
    shutil.rmtree(root / "cola")
    return b.source(*named), [f"{root / 'cola'} is missing", "train.jsonl and validation.jsonl"]


@case
def split_missing(b: Bench):
    root, named = b.data()
    (root / "cola/validation.jsonl").unlink()
    return b.source(*named), ["cola", "neither validation.jsonl nor test.jsonl", "add one"]


@case
def split_empty(b: Bench):
    root, named = b.data()
    (root / "cola/validation.jsonl").write_text("\n")
    return b.source(*named), [str(root / "cola/validation.jsonl"), "holds no rows", "at least one"]


# --- the DeepSpeed JSON ----------------------------------------------------------------------------------------------

case.section("json_torn", '{"zero_optimization": {"stage": 3}', "line 1, column", "not JSON")
case.section(
    "json_key", {"zero_optimisation": {}}, "zero_optimisation is not honoured", "did you mean zero_optimization?"
)
case.section("json_fp16", {"fp16": {"enabled": True}}, "fp16.enabled", "model.dtype=bfloat16")
case.section("json_stage_9", {"zero_optimization": {"stage": 9}}, "zero_optimization.stage is 9", "write 0", "or 3")
case.section("json_stage_2", {"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2", "write 0", "or 3")
case.section("json_optimizer", {"optimizer": {"type": "Adam"}}, "optimizer", "source.optimizer", "remove the section")
case.section(
    "json_scheduler", {"scheduler": {"type": "WarmupLR"}}, "scheduler", "source.schedule", "remove the section"
)
case.section("json_clipping", {"gradient_clipping": 1.0}, "gradient_clipping is 1.0", "source.clip_norm", "remove it")
case.section(
    "json_accumulation", {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4", 'write "auto"'
)
case.section("json_bf16", {"bf16": {"enabled": True}}, "bf16.enabled is true", "model.dtype is float32", 'write "auto"')
case.section("json_wandb", {"wandb": {"enabled": True}}, "wandb", "pip install wandb")


@case
def json_missing(b: Bench):
    return b.source("--deepspeed_config", "zero3_cup"), ["zero3_cup", "did you mean zero3_cpu?"]


@case
def json_batch(b: Bench):
    json_ = b.json({"train_micro_batch_size_per_gpu": 7})
    return b.source(*json_), ["train_micro_batch_size_per_gpu is 7", "make it 12", 'write "auto"']


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)
