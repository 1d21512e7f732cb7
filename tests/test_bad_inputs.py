"""A user's mistakes: exit status 2, one line that names the thing and the mend, no traceback, nothing left behind.

Each case below breaks one thing of a run that would work and says what the line must hold. All run in this process,
where stderr must hold that line and nothing else.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from bmtpt_ds.cli import main
from tests import toy


class Runs(NamedTuple):
    """Finished runs on the tiny model that has a head of its own."""

    source: Path
    adapt: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, untied_model, rows) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(toy.recipe_text(untied_model, rows))
    done = Runs(folder / "source", folder / "adapt")
    assert main(["source", "--config", str(recipe), "--run-dir", str(done.source)]) == 0
    particles = ["--particles", str(done.source)]
    assert main(["adapt", "--config", str(recipe), *particles, "--run-dir", str(done.adapt)]) == 0
    return done


class Bench:
    """What a case breaks: copies in a folder of its own, and command lines that would work."""

    def __init__(self, folder: Path, recipe: Path, untied: Path, tied: Path, rows: Path, runs: Runs):
        self.folder, self.recipe, self.untied, self.tied, self.rows, self.runs = (
            folder,
            recipe,
            untied,
            tied,
            rows,
            runs,
        )
        self.run_dir = folder / "run"

    def source(self, *arguments: str) -> list[str]:
        return ["source", "--config", str(self.recipe), "--run-dir", str(self.run_dir), *arguments]

    def adapt(self, *arguments: str, particles: Path | str | None = None) -> list[str]:
        command = ["adapt", "--config", str(self.recipe), "--run-dir", str(self.run_dir)]
        return [*command, "--particles", str(particles or self.runs.source), *arguments]

    def evaluate(self, *arguments: str, prompt: Path | None = None) -> list[str]:
        return ["evaluate", "--prompt", str(prompt or self.runs.adapt), *arguments]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self) -> tuple[Path, list[str]]:
        """A copy of the model to break, and the arguments that name it."""
        copy = self.folder / "model"
        shutil.copytree(self.untied, copy)
        return copy, ["--set", f"model.name_or_path={copy}"]

    def data(self) -> tuple[Path, list[str]]:
        """A copy of the rows to break, and the arguments that name it."""
        copy = self.folder / "rows"
        shutil.copytree(self.rows, copy)
        return copy, ["--set", f"data.root={copy}"]

    def json(self, content: object) -> list[str]:
        text = content if isinstance(content, str) else json.dumps(content)
        return ["--deepspeed_config", str(self.file("ds.json", text))]

    def interrupted(self, run: Path) -> Path:
        """A copy of a run, at `run_dir`, that has not come to its end: checkpoints and no results."""
        shutil.copytree(run, self.run_dir)
        for name in ("results.json", "particles.safetensors", "prompt.safetensors"):
            (self.run_dir / name).unlink(missing_ok=True)
        return self.run_dir


@pytest.fixture
def bench(tmp_path, recipe, untied_model, tied_model, rows, runs, monkeypatch) -> Bench:
    monkeypatch.chdir(tmp_path)  # what is left in the working directory is left behind too
    return Bench(tmp_path, recipe, untied_model, tied_model, rows, runs)


Case = Callable[[Bench], tuple[list[str], list[str]]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """A case returns the command line and what its line must hold."""
    CASES[function.__name__] = function
    return function


def setting(name: str, text: str, *expected: str, stage: str = "source") -> None:
    """A case that is one `--set`."""
    CASES[name] = lambda b: (getattr(b, stage)("--set", text), list(expected))


def section(name: str, content: object, *expected: str) -> None:
    """A case that is one DeepSpeed JSON."""
    CASES[name] = lambda b: (b.source(*b.json(content)), ["ds.json", *expected])


def snapshot(*folders: Path) -> dict[Path, bytes | None]:
    entries = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in entries}


# --- the recipe ------------------------------------------------------------------------------------------------------

setting("key", "source.stpes=3", "unknown key source.stpes", "did you mean steps?")
setting("key_of_svgd", "source.svgd.bandwith=1", "unknown key source.svgd.bandwith", "did you mean bandwidth?")
setting("section", "sourec.lr=1", "unknown key sourec", "did you mean source?")
setting("set_without_equals", "source.lr", "--set source.lr:", "key=value", "source.lr=0.1")
setting("set_not_yaml", "source.tasks=[sst2", "--set source.tasks=[sst2", "not valid YAML")
setting("set_impossible_date", "run.seed=2024-13-45", "--set run.seed=2024-13-45", "not valid YAML")
setting("set_below_a_number", "run.seed.x=1", "run.seed", "seed is not a section")
setting("task", "source.tasks=[sst3]", "unknown task 'sst3'", "did you mean 'sst2'?")
setting("task_twice", "source.tasks=[sst2, sst2]", "source", "names sst2 more than once")
setting("no_source_task", "source.tasks=[]", "source.tasks is empty", "--set source.tasks=[sst2]")
setting("float16", "model.dtype=float16", "model.dtype", "'float16'", "'bfloat16'", "fp16")
setting("particles_0", "source.particles=0", "source.particles", "greater than or equal to 1", "got 0")
setting("steps_true", "source.steps=true", "source", "steps should not be true")
setting("tasks_per_step", "source.tasks_per_step=3", "tasks_per_step is 3", "2 source tasks")
setting("rows_per_task", "source.rows_per_task=61", "source.rows_per_task of sst2", "at most 60")
setting("lr_negative", "source.lr=-0.1", "source.lr", "greater than 0", "got -0.1")
setting("lr_nan", "source.lr=.nan", "source.lr", "finite")
setting("lr_nan_text", "source.lr=nan", "source.lr", "finite")
setting("warmup", "source.warmup_steps=6", "warmup_steps (6) should be below steps (6)")
setting("prompt_length", "prompt.length=94", "prompt.length 94", "93 tokens")
setting("sigma", "target.sigma=0", "target.sigma", "greater than 0", "got 0", stage="adapt")
setting("shots", "target.shots=61", "target.shots: 61", "give 1 to 60", stage="adapt")
setting("shots_0", "target.shots=0", "target.shots", "greater than or equal to 1", "got 0", stage="adapt")
setting("two_targets", "target.tasks=[mrpc, rte]", "target.tasks names 2 tasks", "target.tasks=[mrpc]", stage="adapt")
setting("target_multi", "target.multi=true", "target", "multi", "one task at a time", stage="adapt")
setting("no_target_task", "target.tasks=[]", "target.tasks is empty", "target.tasks=[", stage="adapt")


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
    return b.source(), ["recipe.yaml", "cannot be read"]


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
    return b.source(*named), [str(model / "config.json")]


@case
def model_config_of_another_kind(b: Bench):
    model, named = b.model()
    (model / "config.json").write_text("[]")
    return b.source(*named), [str(model / "config.json")]


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
    return b.source(*named), [str(model), "tokenizer.json or spiece.model"]


@case
def tokenizer_torn(b: Bench):
    model, named = b.model()
    os.truncate(model / "tokenizer.json", 500)
    return b.source(*named), [str(model), "tokenizer.json"]


@case
def tokenizer_of_a_larger_model(b: Bench):
    model, named = b.model()
    toy.make_tokenizer(model, vocab=200)
    return b.source(*named), [str(model), "tokenizer", "200", "96"]


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

    CASES[name] = make


damaged_rows("column", '{"text": "a", "label": 0}', "column 'sentence' is missing", "'text', 'label'")
damaged_rows("line_torn", '{"sentence": "a", "la', "not valid JSON", "one whole JSON object a line")
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

section("json_torn", '{"zero_optimization": {"stage": 3}', "line 1, column", "not JSON")
section("json_key", {"zero_optimisation": {}}, "zero_optimisation is not honoured", "did you mean zero_optimization?")
section("json_fp16", {"fp16": {"enabled": True}}, "fp16.enabled", "model.dtype=bfloat16")
section("json_stage_9", {"zero_optimization": {"stage": 9}}, "zero_optimization.stage is 9", "write 0", "or 3")
section("json_stage_2", {"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2", "write 0", "or 3")
section("json_optimizer", {"optimizer": {"type": "Adam"}}, "optimizer", "source.optimizer", "remove the section")
section("json_scheduler", {"scheduler": {"type": "WarmupLR"}}, "scheduler", "source.schedule", "remove the section")
section("json_clipping", {"gradient_clipping": 1.0}, "gradient_clipping is 1.0", "source.clip_norm", "remove it")
section("json_accumulation", {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4", 'write "auto"')
section("json_bf16", {"bf16": {"enabled": True}}, "bf16.enabled is true", "model.dtype is float32", 'write "auto"')
section("json_wandb", {"wandb": {"enabled": True}}, "wandb", "pip install wandb")


@case
def json_missing(b: Bench):
    return b.source("--deepspeed_config", "zero3_cup"), ["zero3_cup", "did you mean zero3_cpu?"]


@case
def json_batch(b: Bench):
    json_ = b.json({"train_micro_batch_size_per_gpu": 7})
    return b.source(*json_), ["train_micro_batch_size_per_gpu is 7", "make it 12", 'write "auto"']


# --- the run's directory ---------------------------------------------------------------------------------------------


@case
def run_dir_holds_a_run(b: Bench):
    shutil.copytree(b.runs.source, b.run_dir)
    return b.source(), [f"--run-dir {b.run_dir}: holds a run", "--resume or --overwrite"]


@case
def run_dir_holds_foreign_files(b: Bench):
    b.run_dir.mkdir()
    (b.run_dir / "thesis.tex").write_text("years of work")
    return b.source("--overwrite"), [f"--run-dir {b.run_dir}", "no run of bmtpt", "give another folder"]


@case
def run_dir_is_a_file(b: Bench):
    b.file("run", "not a folder")
    return b.source(), [f"--run-dir {b.run_dir}: that is a file", "give a folder"]


@case
def run_dir_below_a_file(b: Bench):
    b.run_dir = b.file("file", "not a folder") / "runs/new"
    return b.source(), [f"--run-dir {b.run_dir}", f"{b.folder / 'file'} cannot be written", "give a folder"]


@case
def run_dir_in_proc(b: Bench):
    b.run_dir = Path("/proc/bmtpt/run")
    return b.source(), ["--run-dir /proc/bmtpt/run", "cannot be written"]


@case
def run_dir_name_too_long(b: Bench):
    b.run_dir = b.folder / ("n" * 300)
    return b.source(), [f"--run-dir {b.run_dir}", "cannot be written"]


@case
def run_dir_not_ours(b: Bench):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    locked = b.folder / "locked"
    locked.mkdir(mode=0o500)
    b.run_dir = locked / "run"
    return b.source(), [f"--run-dir {b.run_dir}", f"{locked} cannot be written", "give a folder of yours"]


@case
def resume_and_overwrite(b: Bench):
    shutil.copytree(b.runs.source, b.run_dir)
    return b.source("--resume", "--overwrite"), ["--resume and --overwrite exclude each other", "give one"]


@case
def resume_with_another_recipe(b: Bench):
    b.interrupted(b.runs.source)
    return b.source("--resume", "--set", "source.lr=0.1"), ["--resume: source.lr differs", "--overwrite"]


@case
def resume_another_stage(b: Bench):
    b.interrupted(b.runs.source)
    return b.adapt("--resume"), ["--resume: stage differs", str(b.run_dir), "--overwrite"]


@case
def resume_with_config_of_another_kind(b: Bench):
    (b.interrupted(b.runs.source) / "config.yaml").write_text("- not ours\n")
    return b.source("--resume"), [str(b.run_dir / "config.yaml"), "not written by bmtpt"]


@case
def resume_from_truncated_checkpoints(b: Bench):
    checkpoints = sorted((b.interrupted(b.runs.source) / "checkpoints").iterdir())
    for path in checkpoints:
        os.truncate(path, path.stat().st_size - 100)
    return b.source("--resume"), [f"{checkpoints[-1]}: damaged", "--overwrite"]


# --- particles and prompts -------------------------------------------------------------------------------------------


@case
def particles_missing(b: Bench):
    return b.adapt(particles="nowhere"), ["--particles nowhere", "no such file or folder", "or none"]


@case
def particles_of_an_unfinished_run(b: Bench):
    run = b.interrupted(b.runs.source).rename(b.folder / "unfinished")
    return b.adapt(particles=run), [str(run), "no particles.safetensors", "finish that run", "--resume"]


@case
def particles_of_an_adaptation(b: Bench):
    return b.adapt(particles=b.runs.adapt), [str(b.runs.adapt), "no particles.safetensors", "`bmtpt source`"]


@case
def particles_from_a_prompt_file(b: Bench):
    path = b.runs.adapt / "prompt.safetensors"
    return b.adapt(particles=path), [str(path), "no tensor 'particles'", "`bmtpt source`"]


@case
def particles_from_a_checkpoint(b: Bench):
    path = b.runs.source / "checkpoints/step-00000006.safetensors"
    return b.adapt(particles=path), [str(path), "a checkpoint", "particles.safetensors"]


@case
def particles_of_another_model(b: Bench):
    expected = [str(b.runs.source), str(b.untied), "weights", str(b.tied), "set model.name_or_path"]
    return b.adapt("--set", f"model.name_or_path={b.tied}"), expected


@case
def particles_of_another_length(b: Bench):
    return b.adapt("--set", "prompt.length=4"), [str(b.runs.source), "have 5 tokens", "--set prompt.length=5"]


@case
def particles_file_not_ours(b: Bench):
    return b.adapt(particles=b.untied / "model.safetensors"), ["model.safetensors", "not a file of bmtpt_ds", "give"]


@case
def particles_file_of_text(b: Bench):
    path = b.file("particles.safetensors", "hello")
    return b.adapt(particles=path), [str(path), "damaged"]


@case
def particles_file_altered(b: Bench):
    data = bytearray((b.runs.source / "particles.safetensors").read_bytes())
    data[-1] ^= 1
    path = b.file("particles.safetensors", bytes(data))
    return b.adapt(particles=path), [str(path), "damaged", "SHA-256"]


# --- evaluate --------------------------------------------------------------------------------------------------------


@case
def evaluate_no_run(b: Bench):
    return b.evaluate(prompt=b.rows), [str(b.rows), "not a run's directory", "config.yaml"]


@case
def evaluate_unfinished(b: Bench):
    run = b.interrupted(b.runs.adapt)
    return b.evaluate(prompt=run), [str(run), "no prompt.safetensors", "finish that run", "--resume"]


@case
def evaluate_misspelt_task(b: Bench):
    return b.evaluate("--task", "mprc"), ["unknown task 'mprc'", "did you mean 'mrpc'?"]


@case
def evaluate_task_of_another_prompt(b: Bench):
    return b.evaluate("--task", "rte"), ["--task rte", str(b.runs.adapt), "is for mrpc"]


@case
def evaluate_json_into_a_missing_folder(b: Bench):
    path = b.folder / "nowhere/scores.json"
    return b.evaluate("--json", str(path)), [f"{path}", f"{path.parent} does not exist"]


@case
def evaluate_json_is_a_folder(b: Bench):
    return b.evaluate("--json", str(b.folder)), [f"--json {b.folder}", "is a folder", "give a file"]


@case
def evaluate_rows_gone(b: Bench):
    path = b.folder / "nowhere"
    return b.evaluate("--set", f"data.root={path}"), [f"data.root: {path} does not exist"]


@case
def evaluate_with_another_model(b: Bench):
    expected = [str(b.runs.adapt), str(b.untied), "set model.name_or_path"]
    return b.evaluate("--set", f"model.name_or_path={b.tied}"), expected


@pytest.mark.parametrize("name", CASES)
def test_mistake(name, bench, capsys):
    arguments, expected = CASES[name](bench)
    before = snapshot(bench.folder, bench.runs.source.parent)
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 2
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"bmtpt {arguments[0]}: ")
    missing = [text for text in expected if text not in lines[0]]
    assert not missing, err
    assert "Traceback" not in out + err
    assert snapshot(bench.folder, bench.runs.source.parent) == before
