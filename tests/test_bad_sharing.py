"""Mistakes about export and import: one line that names the thing and the mend, exit status 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmtpt_ds.cli import main
from tests.mistakes import Bench, Cases, assert_refused

case = Cases()


def export(b: Bench, *arguments: str, prompt: Path | None = None) -> list[str]:
    return ["export", "--prompt", str(prompt or b.runs.adapt), "--out", str(b.out), *arguments]


def import_(b: Bench, *arguments: str) -> list[str]:
    return ["import", "--peft", *arguments, "--out", str(b.out)]


def adapter(b: Bench, name: str = "adapter", **changes) -> Path:
    """An adapter that could be imported, but for `changes` in its configuration."""
    folder = b.folder / name
    assert main(["export", "--prompt", str(b.runs.adapt), "--out", str(folder)]) == 0
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_tensors(b: Bench, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = adapter(b)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- export ----------------------------------------------------------------------------------------------------------


@case
def no_such_run(b: Bench):
    return export(b, prompt=b.folder / "nowhere"), ["nowhere: not a run's directory", "--run-dir"]


@case
def unfinished_run(b: Bench):
    return export(b, prompt=b.interrupted(b.runs.adapt)), ["no prompt.safetensors there", "--resume"]


@case
def runs_side_by_side(b: Bench):
    b.interrupted(b.runs.adapt)
    shutil.copytree(b.runs.adapt, b.run_dir / "runs/mrpc-0")
    return export(b, prompt=b.run_dir), ["1 runs side by side", "runs/mrpc-0"]


@case
def another_runs_task(b: Bench):
    return export(b, "--task", "mrcp"), ["--task mrcp", "is for mrpc", "did you mean mrpc?"]


@case
def a_task_of_a_source_run(b: Bench):
    return export(b, "--task", "mrpc", prompt=b.runs.source), ["--task", "bmtpt source", "of no single task"]


@case
def no_license_of_the_hub(b: Bench):
    return export(b, "--license", "do what you like"), ["--license 'do what you like'", "apache-2.0"]


@case
def damaged_results(b: Bench):
    shutil.copytree(b.runs.adapt, b.run_dir)
    (b.run_dir / "results.json").write_text('{"tasks": {"mrpc": {}}}')
    return export(b, prompt=b.run_dir), ["results.json: not as a run writes it", "copy the run again"]


@case
def out_holds_an_export(b: Bench):
    assert main(export(b)) == 0
    return export(b), [f"--out {b.out}: holds an export", "--overwrite"]


@case
def out_holds_foreign_files(b: Bench):
    assert main(export(b)) == 0
    (b.out / "thesis.tex").write_text("years of work")
    return export(b, "--overwrite"), [f"--out {b.out}: holds thesis.tex", "move it away"]


@case
def out_is_a_run(b: Bench):
    shutil.copytree(b.runs.adapt, b.out)
    return export(b, "--overwrite"), [f"--out {b.out}", "`bmtpt export` has not written", "give a new folder"]


# --- import: the folder ----------------------------------------------------------------------------------------------


@case
def no_such_adapter(b: Bench):
    return import_(b, "owner/prompt"), ["--peft owner/prompt: no such folder", "hf download owner/prompt"]


@case
def a_run_for_an_adapter(b: Bench):
    return import_(b, str(b.runs.adapt)), [str(b.runs.adapt), "no adapter_config.json", "PEFT adapter"]


@case
def a_folder_of_adapters(b: Bench):
    return import_(b, str(adapter(b, "all/mrpc").parent)), ["no adapter_config.json", "such as", "all/mrpc"]


@case
def configuration_not_json(b: Bench):
    folder = adapter(b)
    (folder / "adapter_config.json").write_text("peft_type: PROMPT_TUNING")
    return import_(b, str(folder)), ["adapter_config.json: not a valid JSON file", "copy the adapter again"]


@case
def another_kind_of_adapter(b: Bench):
    return import_(b, str(adapter(b, peft_type="LORA"))), ["a LORA adapter", "PROMPT_TUNING", "rank 1"]


@case
def another_task_type(b: Bench):
    return import_(b, str(adapter(b, task_type="CAUSAL_LM"))), ["task_type is CAUSAL_LM", "SEQ_2_SEQ_LM"]


@case
def a_greater_rank(b: Bench):
    return import_(b, str(adapter(b, num_ranks=2))), ["num_ranks is 2", "rank 1"]


@case
def a_prompt_before_the_decoder_too(b: Bench):
    expected = ["num_transformer_submodules is 2", "before the decoder too", "num_transformer_submodules=1"]
    return import_(b, str(adapter(b, num_transformer_submodules=None))), expected


@case
def no_number_of_tokens(b: Bench):
    return import_(b, str(adapter(b, num_virtual_tokens="5"))), ["num_virtual_tokens expected a number", "'5'"]


@case
def a_pickle(b: Bench):
    folder = adapter(b)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return import_(b, str(folder)), ["adapter_model.bin: a pickle can run code", "save_pretrained"]


@case
def no_weights(b: Bench):
    folder = adapter(b)
    (folder / "adapter_model.safetensors").unlink()
    return import_(b, str(folder)), ["no adapter_model.safetensors", "copy the adapter again"]


@case
def truncated_weights(b: Bench):
    folder = adapter(b)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-100])
    return import_(b, str(folder)), ["adapter_model.safetensors: damaged", "copy the adapter again"]


@case
def a_missing_tensor(b: Bench):
    folder = with_tensors(b, lambda tensors: tensors.pop("prefix_task_cols"))
    return import_(b, str(folder)), ["holds no tensor 'prefix_task_cols'"]


@case
def another_shape(b: Bench):
    folder = with_tensors(b, lambda tensors: tensors.update(prompt_embeddings=torch.zeros(4, 32)))
    return import_(b, str(folder)), ["prompt_embeddings is (4, 32)", "says (5, 32)", "copy both again"]


@case
def not_finite(b: Bench):
    folder = with_tensors(b, lambda tensors: tensors["prompt_embeddings"][0].fill_(torch.nan))
    return import_(b, str(folder)), ["prompt_embeddings holds values that are no finite numbers"]


@case
def damaged_record(b: Bench):
    folder = adapter(b)
    (folder / "bmtpt.json").write_text('{"stage": "adapt"}')
    return import_(b, str(folder)), ["bmtpt.json: not as `bmtpt export` wrote it", "remove that file"]


@case
def a_record_without_counts(b: Bench):
    folder = adapter(b)
    record = json.loads((folder / "bmtpt.json").read_text())
    del record["state"]["rows_processed"]
    (folder / "bmtpt.json").write_text(json.dumps(record))
    return import_(b, str(folder)), ["bmtpt.json: not as `bmtpt export` wrote it"]


@case
def a_record_with_another_recipe(b: Bench):
    folder = adapter(b)
    record = json.loads((folder / "bmtpt.json").read_text())
    record["recipe"]["target"]["shoots"] = 8
    (folder / "bmtpt.json").write_text(json.dumps(record))
    return import_(b, str(folder)), ["bmtpt.json", "shoots", "shots"]


# --- import: whom it belongs to, what it is for ----------------------------------------------------------------------


@case
def no_base_model(b: Bench):
    return import_(b, str(adapter(b, base_model_name_or_path=None))), ["no base model", "--set model.name_or_path"]


@case
def two_base_models(b: Bench):
    folders = [adapter(b, "one"), adapter(b, "two", base_model_name_or_path="t5-base")]
    return import_(b, *map(str, folders)), ["two names t5-base", "--set model.name_or_path"]


@case
def base_model_elsewhere(b: Bench):
    folder = adapter(b, base_model_name_or_path="/scratch/theirs/t5")
    return import_(b, str(folder)), ["model.name_or_path /scratch/theirs/t5: no such folder"]


@case
def another_model_of_that_size(b: Bench):
    folder = adapter(b)
    expected = ["bmtpt.json: belongs to", "weights", "set model.name_or_path to the model that it was trained with"]
    return [*import_(b, str(folder)), "--set", f"model.name_or_path={b.tied}"], expected


@case
def another_hidden_size(b: Bench):
    folder = with_tensors(b, lambda t: t.update({k: v[..., :16].contiguous() for k, v in t.items() if "cols" not in k}))
    config = json.loads((folder / "adapter_config.json").read_text()) | {"token_dim": 16}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return import_(b, str(folder)), ["hidden size 16", "has 32", "model.name_or_path"]


@case
def prompts_of_two_lengths(b: Bench):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["prompt_embeddings"] = tensors["prompt_embeddings"][:4].contiguous()
        tensors["prefix_task_cols"] = tensors["prefix_task_cols"][:, :4].contiguous()

    long, short = adapter(b, "long"), with_tensors(b, shorten)
    config = json.loads((short / "adapter_config.json").read_text()) | {"num_virtual_tokens": 4}
    (short / "adapter_config.json").write_text(json.dumps(config))
    return import_(b, str(long), str(short)), ["[4, 32]", "[5, 32]", "give adapters of one shape"]


@case
def another_length_asked_for(b: Bench):
    expected = ["--set prompt.length=7", "5 tokens", "leave it out"]
    return [*import_(b, str(adapter(b))), "--set", "prompt.length=7"], expected


@case
def more_tasks_than_prompts(b: Bench):
    expected = ["--task: names 2 tasks", "holds 1"]
    return [*import_(b, str(adapter(b))), "--task", "mrpc", "rte"], expected


@case
def an_unknown_task(b: Bench):
    return [*import_(b, str(adapter(b))), "--task", "mrcp"], ["mrcp", "mrpc"]


@case
def a_task_of_several_adapters(b: Bench):
    folders = [adapter(b, "one"), adapter(b, "two")]
    return [*import_(b, *map(str, folders)), "--task", "mrpc"], ["--task", "2 adapters become particles"]


@case
def out_is_a_trained_run(b: Bench):
    shutil.copytree(b.runs.adapt, b.out)
    return [*import_(b, str(adapter(b))), "--overwrite"], [f"--out {b.out}: holds", "move it away"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys) -> None:
    assert_refused(case[name], bench, capsys)


def test_overwrite_replaces_what_the_commands_wrote(bench: Bench) -> None:
    for _ in range(2):
        assert main([*export(bench, "--composed"), "--overwrite"]) == 0
    first, bench.out = bench.out, bench.folder / "imported"
    for _ in range(2):
        assert main([*import_(bench, str(first)), "--overwrite"]) == 0
