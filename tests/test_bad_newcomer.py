"""What a newcomer gets wrong in the first hour, and what a newcomer may expect to work.

A case breaks one thing of a command that would work; it returns the command line and what its one line must hold.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from bmtpt_ds.cli import main
from tests.mistakes import Bench, Cases, assert_refused

case = Cases()

# --- the recipe ------------------------------------------------------------------------------------------------------


def recipe_of(name: str, content: str | bytes, *expected: str) -> None:
    """A case that is what the recipe's file holds."""

    def make(b: Bench):
        b.file("recipe.yaml", content)
        return b.source(), ["recipe.yaml", *expected]

    case[name] = make


recipe_of("recipe_with_tabs", "model:\n\tdtype: float32\n", "line 2", "indent with spaces, not with tabs")
recipe_of("recipe_in_latin", "data: {root: fünf}\n".encode("latin-1"), "not UTF-8 (byte 15)", "save the file as UTF-8")
recipe_of("recipe_twice_in_a_file", "run: {}\n---\nrun: {}\n", "line 2", "another document", "remove the line ---")
recipe_of("recipe_without_a_space", "source:\n  steps:6\n", "source:", "'steps:6'", "put a space behind the colon")
recipe_of("recipe_indented_unevenly", "run:\n  seed: 1\n   keep: 2\n", "line 3", "indent keys of a section alike")
recipe_of("recipe_of_a_later_version", "distill: {rate: 2}\n", "unknown key distill", "known: method, model, prompt")
case.setting("task_for_a_list", "source.tasks=sst2", "source.tasks", "(got 'sst2')", "write a list, [sst2]")
case.setting("tasks_with_commas", "source.tasks=sst2,rte", "source.tasks", "write a list, [sst2, rte]")
case.setting("key_without_its_section", "steps=7", "unknown key steps", "did you mean source.steps or target.steps?")


@case
def recipe_is_a_folder(b: Bench):
    return ["source", "--config", str(b.rows), "--run-dir", "run"], [f"recipe {b.rows}", "a folder; give a YAML file"]


# --- the model and the rows ------------------------------------------------------------------------------------------


@case
def model_is_a_file(b: Bench):
    b.file("t5-small.gguf", b"GGUF" + bytes(100))  # its name could be one on the hub
    chosen = ["--set", "model.name_or_path=t5-small.gguf"]
    return b.check(*chosen), ["model.name_or_path t5-small.gguf: that is a file; give the folder of a T5"]


@case
def data_root_is_a_tasks_folder(b: Bench):
    expected = ["data.root:", f"{b.rows}/sst2 is the folder of one task", "give the one above it, which holds sst2/"]
    return b.source("--set", f"data.root={b.rows}/sst2"), expected


@case
def rows_under_another_name(b: Bench):
    root, named = b.data()
    (root / "cola/train.jsonl").rename(root / "cola/train.csv")
    return b.source(*named), [f"{root}/cola/train.jsonl is missing", "there: train.csv, validation.jsonl"]


@case
def rows_are_a_csv_renamed(b: Bench):
    root, named = b.data()
    (root / "cola/train.jsonl").write_text('sentence,label\n"a film",0\n')
    return b.source(*named), [f"{root}/cola/train.jsonl:1: not valid JSON", "one whole JSON object a line"]


@case
def rows_are_one_array(b: Bench):
    root, named = b.data()
    (root / "cola/train.jsonl").write_text('[{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}]\n')
    return b.source(*named), [f"{root}/cola/train.jsonl:1: not an object", "a list; write {sentence, label}"]


@case
def label_as_a_word(b: Bench):
    root, named = b.data()
    (root / "cola/train.jsonl").write_text('{"sentence": "a", "label": "acceptable"}\n')
    expected = [f"{root}/cola/train.jsonl:1: column 'label' must be an integer", "'acceptable' is 1"]
    return b.source(*named), expected


# --- runs and files --------------------------------------------------------------------------------------------------


@case
def prompt_is_a_file(b: Bench):
    file = b.runs.adapt / "prompt.safetensors"
    return b.evaluate(prompt=file), [str(file), "not a run's directory (a file)", f"its folder, {b.runs.adapt}"]


@case
def prompt_is_the_folder_of_all_runs(b: Bench):
    return b.evaluate(prompt=b.runs.adapt.parent), [
        "no config.yaml in it",
        "give the folder that was a run's --run-dir",
    ]


@case
def evaluate_for_another_task(b: Bench):
    expected = [f"{b.runs.adapt}/prompt.safetensors: its prompt is for mrpc and not for rte", "--set target.tasks"]
    return b.evaluate("--set", "target.tasks=[rte]"), expected


@case
def predict_for_another_task(b: Bench):
    return b.predict("--set", "target.tasks=[rte]"), ["its prompt is for mrpc and not for rte"]


@case
def one_file_for_scores_and_predictions(b: Bench):
    given = ["--json", "out.json", "--predictions", "./out.json"]
    return b.evaluate(*given), ["--predictions out.json: that is what --json writes; give another file"]


@case
def model_of_a_run_moved_away(b: Bench):
    run = b.folder / "mine"
    shutil.copytree(b.runs.adapt, run)
    text = (run / "config.yaml").read_text().replace(f"name_or_path: {b.untied}", "name_or_path: /nowhere/t5")
    (run / "config.yaml").write_text(text)
    return b.predict(prompt=run), ["model.name_or_path /nowhere/t5: no such folder; give the folder of a T5 checkpoint"]


@case
def demo_in_proc(b: Bench):
    return ["demo", "--out", "/proc/demo"], ["--out /proc/demo: cannot be written"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "source.lr", "=", "0.1"], "'=' belongs to no option; write KEY=VALUE without spaces"),
        (["--set", "source.lr=", "0.1"], "'0.1' belongs to no option; write KEY=VALUE without spaces"),
        (["--deepspeed_config", ""], "argument --deepspeed_config: empty; is a variable of the shell not set?"),
        (["--config="], "argument --config: empty; is a variable of the shell not set?"),
    ],
)
def test_a_command_line_of_a_shell(words: list[str], said: str, bench: Bench, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(bench.check(*words))
    err = capsys.readouterr().err
    assert (ended.value.code, len(err.splitlines())) == (2, 1)
    assert said in err


def test_options_before_the_command(bench: Bench, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(bench.recipe), "check"])
    assert ended.value.code == 2
    assert "it goes behind the command, bmtpt source --config" in capsys.readouterr().err


# --- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "carriage returns", "byte order mark"])
def test_recipes_as_other_programs_write_them(kind: str, bench: Bench) -> None:
    text = bench.recipe.read_text()
    if kind == "json":
        bench.recipe = bench.file("recipe.json", json.dumps(yaml.safe_load(text), indent=2))
    elif kind == "carriage returns":
        bench.file("recipe.yaml", text.replace("\n", "\r\n"))
    else:
        bench.file("recipe.yaml", text.encode("utf-8-sig"))
    assert main(bench.check()) == 0


def test_the_home_folder_behind_an_equals_sign(bench: Bench, monkeypatch) -> None:
    """A shell leaves `--run-dir=~/run` as it is."""
    monkeypatch.setenv("HOME", str(bench.folder))
    shutil.copytree(bench.untied, bench.folder / "t5")
    command = ["source", "--config=~/recipe.yaml", "--run-dir=~/run", "--set", "model.name_or_path=~/t5/"]
    assert main(command) == 0
    assert (bench.folder / "run/results.json").is_file()
    assert not Path("~").exists()
    assert main(["evaluate", "--prompt=~/run", "--json=~/scores.json"]) == 0
    assert json.loads((bench.folder / "scores.json").read_text())["tasks"].keys() == {"sst2", "cola"}


def test_a_run_moved_elsewhere_under_a_name_of_spaces_and_umlauts(bench: Bench) -> None:
    here, there = bench.folder / "here.json", bench.folder / "meine Läufe (neu)/Punkte.json"
    assert main(bench.evaluate("--json", str(here))) == 0
    shutil.copytree(bench.runs.adapt, there.parent)
    assert main(bench.evaluate("--json", str(there), prompt=there.parent)) == 0
    assert there.read_bytes() == here.read_bytes()
    bench.run_dir = there.parent / "Ü"
    particles = bench.folder / "Proben ö"
    shutil.copytree(bench.runs.source, particles)
    assert main(bench.adapt(particles=particles)) == 0
    again = yaml.safe_load((bench.run_dir / "config.yaml").read_text())["particles"]
    assert os.fspath(particles) == again
    assert main(bench.adapt("--resume", particles=particles)) == 0
