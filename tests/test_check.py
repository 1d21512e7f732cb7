"""`bmtpt check`: finds what the commands would find, on a machine that has none of their libraries."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bmtpt_ds.cli import main
from bmtpt_ds.config import find_recipe, load_recipe
from bmtpt_ds.model_folder import read_architecture
from tests import launch
from tests.mistakes import Bench, Cases, assert_refused, snapshot
from tests.test_bad_inputs import case as bad_inputs

# what only the libraries can tell, or a stage that a recipe may do without
BEYOND = {
    "model_lacks_a_tensor",
    "model_tensor_of_another_shape",
    "model_shard_truncated",
    "model_bin_of_text",
    "tokenizer_torn",
    "tokenizer_of_another_kind",
    "tokenizer_of_a_larger_model",
    "json_wandb",
    "json_batch",
    "no_source_task",
    "no_target_task",
    "two_targets",  # each in a run of its own
    "grid",  # of how many ranks
}
BLOCKED = (
    "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "datasets", "sklearn", "scipy", "tensorboard",
    "triton", "mpi4py", "fcntl",
)  # fmt: skip
WITHOUT_LIBRARIES = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Blocked())
from bmtpt_ds.cli import main
sys.exit(main(sys.argv[1:]))
"""


def checked(capsys, *arguments: object) -> list[str]:
    assert main(["check", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_recipe_of_both_stages(recipe: Path, untied_model: Path, rows: Path, capsys) -> None:
    before = snapshot(recipe.parent)
    lines = checked(capsys, "--config", recipe, "--deepspeed_config", "zero3")
    text = " ".join(" ".join(lines).split())
    assert lines[-1] == "ok"
    assert max(map(len, lines)) <= max(100, len(str(rows)) + 60)
    parameters = sum(tensor.numel() for tensor in tensors(untied_model))
    assert f"{untied_model}: T5, 2 + 2 blocks, width 32, {parameters / 1e6:.3g} million parameters, float32" in text
    assert "tokenizer.json, model.safetensors " in text
    assert f"5 tokens x 32; 3 particles are {3 * 5 * 32 * 4 / 1000:.0f} kB" in text
    assert "6 steps of 2 tasks x 2 rows x 3 particles, 12 rows through the model a step" in text
    assert "6 steps of 4 rows, 8 shots" in text
    for task in ("sst2", "cola", "mrpc"):
        assert f"{task}: train 60, validation 15, test 15; {rows / task}" in text
    assert "zero3: stage 3" in text
    assert 'zero_optimization.stage3_param_persistence_threshold "auto": 320' in text
    assert 'bf16.enabled "auto": false' in text
    assert snapshot(recipe.parent) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "2 tasks in a run each (--set target.tasks=[mrpc]), 6 steps of 4 rows, 8 shots a task"),
        (["target.seeds=[0, 4]"], "2 tasks side by side, 6 steps of 4 rows, 8 shots a task; a run of each seed: 0, 4"),
        (["target.multi=true"], "2 tasks at once, 6 steps of 4 rows, 8 shots a task"),
        (["target.batch_size=32"], "6 steps of 8 rows, 8 shots a task"),
        (["target.batch_size=32", "target.multi=true"], "6 steps of 16 rows, 8 shots a task"),
        (["target.batch_size=500", "target.multi=true", "target.shots=null"], "6 steps of 120 rows"),
    ],
)
def test_several_targets(recipe: Path, rows: Path, capsys, settings: list[str], said: str) -> None:
    chosen = [a for setting in ("target.tasks=[mrpc, rte]", *settings) for a in ("--set", setting)]
    text = " ".join(" ".join(checked(capsys, "--config", recipe, *chosen)).split())
    assert said in text
    assert all(f"{task}: train 60, validation 15, test 15; {rows / task}" in text for task in ("mrpc", "rte"))


def tensors(model: Path) -> list:
    import torch

    from bmtpt_ds.model.backbone import build_backbone, read_config
    from bmtpt_ds.model.weights import CheckpointReader

    own_head = CheckpointReader(model).has_own_head()
    return list(build_backbone(read_config(model, 0.0), dtype=torch.float32, own_head=own_head).parameters())


@pytest.mark.parametrize("name", ["tied_model", "untied_model"])
def test_parameters_are_counted_without_torch(name: str, request) -> None:
    model = request.getfixturevalue(name)
    assert read_architecture(model).parameters == sum(tensor.numel() for tensor in tensors(model))


@pytest.mark.shared
def test_parameters_of_a_real_model(shared: Path) -> None:
    model = shared / "models" / "flan-t5-small-titles"
    assert read_architecture(model).parameters == sum(tensor.numel() for tensor in tensors(model)) == 76_961_152


def test_any_machine_will_do(recipe: Path, rows: Path, tmp_path: Path) -> None:
    """The libraries that train are not needed, and what is wrong is found all the same."""
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, "check", "--config", str(recipe), "--set"]
    environment = launch.environment()
    good = subprocess.run([*command, "run.seed=1"], env=environment, capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1] == "ok"
    bad = subprocess.run([*command, "target.shots=61"], env=environment, capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("bmtpt check: target.shots: 61") and len(bad.stderr.splitlines()) == 1


def test_the_blocker_blocks(recipe: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, "prepare", "--config", str(recipe), "--out", "nowhere"]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, timeout=60)
    assert re.search(r"ImportError: \w+ is not here", done.stderr)


def test_what_is_on_the_hub_is_named_and_not_asked_for(recipe: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", None)
    chosen = ("--set", "model.name_or_path=google-t5/t5-base", "--set", "data.root=null")
    lines = checked(capsys, "--config", recipe, *chosen)
    text = " ".join(" ".join(lines).split())
    assert lines[-1] == "ok"
    assert "google-t5/t5-base: not here, will be downloaded from the hub" in text
    assert "5 tokens by the model's width" in text
    for task in ("sst2", "cola", "mrpc"):
        assert f"{task}: will be downloaded, nyu-mll/glue ({task})" in text


@pytest.mark.parametrize("stage", ["source", "target"])
def test_a_recipe_of_one_stage(stage: str, recipe: Path, capsys) -> None:
    lines = checked(capsys, "--config", recipe, "--set", f"{stage}.tasks=[]")
    assert any(line.split() == [stage, "no", "tasks" if stage == "source" else "task"] for line in lines)
    assert lines[-1] == "ok"


def recipes() -> list[str]:
    """The shipped recipes, but for those whose rows are made by the command that is theirs."""
    folder = find_recipe("first_run").parent
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return [name for name in names if not load_recipe(name).data.tasks]


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes(name: str, capsys) -> None:
    lines = checked(capsys, "--config", name, "--set", "data.root=null")
    assert lines[0].split() == ["recipe", name]
    assert lines[-1] == "ok"


@pytest.mark.parametrize("name", sorted(path.stem for path in (launch.ROOT / "ds_configs").glob("*.json")))
def test_shipped_jsons(name: str, recipe: Path, capsys) -> None:
    dtype = json.loads((launch.ROOT / "ds_configs" / f"{name}.json").read_text()).get("bf16", {}).get("enabled")
    settings = ("--set", "model.dtype=bfloat16") if dtype is True else ()
    assert checked(capsys, "--config", recipe, "--deepspeed_config", name, *settings)[-1] == "ok"


def test_rows_of_prepared_data(recipe: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "prepared"
    assert main(["prepare", "--config", str(recipe), "--out", str(out)]) == 0
    capsys.readouterr()
    text = " ".join(" ".join(checked(capsys, "--config", recipe, "--set", f"data.root={out}")).split())
    assert f"mrpc: train 60, validation 15, test 15; prepared in {out}" in text


# --- mistakes --------------------------------------------------------------------------------------------------------

case = Cases()


def as_check(name: str):
    """A mistake of a run's, in the command line that only checks."""

    def make(b: Bench):
        command, expected = bad_inputs[name](b)
        kept, skip = [], False
        for word in command[1:]:
            if not skip and word not in ("--run-dir", "--particles"):
                kept.append(word)
            skip = word in ("--run-dir", "--particles")
        return ["check", *kept], expected

    return make


for name in bad_inputs:
    if name not in BEYOND:
        case[name] = as_check(name)


@case
def no_task_at_all(b: Bench):
    nothing = ["--set", "source.tasks=[]", "--set", "target.tasks=[]"]
    return b.check(*nothing), ["source.tasks and target.tasks are empty", "--set target.tasks=[mrpc]"]


@case
def own_task_without_files(b: Bench):
    own = "data.tasks.reviews={source: {review: text}, target: stars, labels: [bad, good], folder: nowhere}"
    return b.check("--set", own, "--set", "target.tasks=[reviews]"), ["data.tasks.reviews.folder", "nowhere"]


@case
def blocks_of_unequal_particles(b: Bench):
    return b.check("--set", "source.particle_ranks=2"), ["source.particle_ranks: 2 must divide the 3 particles"]


@case
def wandb_that_is_not_installed(b: Bench):
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    file = b.json({"wandb": {"enabled": True}})
    return b.check(*file), ["wandb.enabled is true but wandb is not installed"]


@case
def shard_missing(b: Bench):
    model, named = b.model()
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return b.check(*named), [f"{model / 'model-00001-of-00002.safetensors'}: missing", "copy the model folder again"]


@case
def size_of_nothing(b: Bench):
    model, named = b.model()
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"num_heads": 0}))
    return b.check(*named), [str(model / "config.json"), "'num_heads' expected int, got 0"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)


@pytest.mark.parametrize(
    "settings", [["method=prompt_tuning", "source.rows_per_task=100"], ["method=lora", "prompt.length=95"]]
)
def test_what_a_method_does_not_look_at_is_no_mistake(recipe: Path, capsys, settings: list[str]) -> None:
    assert main(["check", "--config", str(recipe), *(word for text in settings for word in ("--set", text))]) == 0
    assert capsys.readouterr().out.endswith("ok\n")


def test_a_run_finds_the_missing_shard_too(bench: Bench, capsys) -> None:
    command, expected = shard_missing(bench)
    assert_refused(lambda b: (b.source(*command[3:]), expected), bench, capsys)
