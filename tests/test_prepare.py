"""`bmtpt prepare`: the folder holds what the raw rows would give, and runs on both are equal."""

import hashlib
import json
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from bmtpt_ds.cli import main
from bmtpt_ds.config import load_recipe
from bmtpt_ds.data.prepared import MANIFEST, PreparedRow
from bmtpt_ds.data.splits import load_task
from bmtpt_ds.data.tokens import RowEncoder
from bmtpt_ds.stage_inputs import every_task, read_splits
from bmtpt_ds.tasks import get_task
from tests import launch, toy
from tests.hub_server import serving
from tests.mistakes import Runs, given, snapshot

SPLITS = ("train", "validation", "test")
OWN = "data.tasks.reviews={source: {review: text}, target: stars, labels: [bad, good], folder: FOLDER}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, untied_model: Path, rows: Path) -> Path:
    """The tasks of the toy recipe, prepared from a copy of the rows that is gone; to read only."""
    folder = tmp_path_factory.mktemp("prepared")
    raw = shutil.copytree(rows, folder / "raw")
    (folder / "recipe.yaml").write_text(toy.recipe_text(untied_model, raw))
    assert main(["prepare", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    shutil.rmtree(raw)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "out"}
    return folder / "out"


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- what is written -------------------------------------------------------------------------------------------------


def test_every_split_with_the_ids_of_its_text(prepared: Path, rows: Path, untied_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(untied_model)
    for name in ("sst2", "cola", "mrpc"):
        raw = load_task(get_task(name), root=str(rows))
        for split in SPLITS:
            found = lines_of(prepared / name / f"{split}.jsonl")
            ids = [row.pop("_token_ids") for row in found]
            assert found == getattr(raw, split)
            for row, id_ in zip(found, ids, strict=True):
                fields = [f"{key}: {value}" for key, value in row.items() if key not in ("label", "idx")]
                assert id_["source"] == tokenizer(" ".join(fields)).input_ids[:32]
                assert id_["target"] == tokenizer(str(row["label"])).input_ids


def test_the_manifest(prepared: Path, untied_model: Path) -> None:
    manifest = json.loads((prepared / MANIFEST).read_text())
    assert manifest["model"] == str(untied_model)
    assert manifest["settings"] == {
        "data.split_seed": 42,
        "data.labels": "digits",
        "data.prefix": False,
        "model.max_source_length": 32,
        "model.max_target_length": "auto",
    }
    assert set(manifest["versions"]) == {"bmtpt_ds", "transformers", "tokenizers"}
    assert list(manifest["tasks"]) == ["sst2", "cola", "mrpc"]
    files = {MANIFEST}
    for name, task in manifest["tasks"].items():
        assert task["definition"] is None
        for split, rows in zip(SPLITS, (60, 15, 15), strict=True):
            path = prepared / name / f"{split}.jsonl"
            assert task["files"][split] == {"rows": rows, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            files.add(f"{name}/{split}.jsonl")
    assert {str(path.relative_to(prepared)) for path in prepared.rglob("*") if path.is_file()} == files


def test_progress_and_what_else_is_needed(recipe: Path, tmp_path: Path, untied_model: Path, capsys) -> None:
    assert main(["prepare", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    *tasks, where, model = err.splitlines()
    assert out == ""
    assert [line.split()[:3] for line in tasks] == [
        ["prepare:", f"{name}:", "train"] for name in ("sst2", "cola", "mrpc")
    ]
    assert f"--set data.root={tmp_path / 'out'}" in where
    assert str(untied_model) in model


def test_neither_deepspeed_nor_weights_are_needed(recipe: Path, untied_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(untied_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    code = "import sys; sys.modules['deepspeed'] = None; from bmtpt_ds.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [
        "prepare",
        "--config",
        str(recipe),
        "--out",
        str(tmp_path / "out"),
        "--set",
        f"model.name_or_path={model}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=launch.environment(), capture_output=True, timeout=launch.LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / MANIFEST).is_file()


def test_of_a_model_on_the_hub_the_tokenizer_is_fetched_alone(recipe: Path, untied_model: Path, tmp_path: Path) -> None:
    with serving() as hub:
        hub.folders["models/toy/t5"] = untied_model
        variables = launch.environment() | hub.variables(tmp_path / "home")
        named = ("--config", recipe, "--set", "model.name_or_path=toy/t5")

        def run(*command: object) -> subprocess.CompletedProcess:
            return subprocess.run(
                launch.plain(*command), env=variables, capture_output=True, text=True, timeout=launch.LIMIT
            )

        done = run("prepare", *named, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert {"config.json", "tokenizer.json"} <= set(hub.fetched()) <= {path.name for path in untied_model.iterdir()}
        assert "model.safetensors" not in hub.fetched()
        assert "hf download toy/t5 --local-dir DIR" in done.stderr.splitlines()[-1]
        assert "toy/t5: not here, will be downloaded" in run("check", *named).stdout
        fetch = subprocess.run(
            [sys.executable, "-c", "from bmtpt_ds.hub import find_model; find_model('toy/t5')"],
            env=variables,
            timeout=launch.LIMIT,
        )
        assert fetch.returncode == 0
    checked = run("check", *named)  # the hub has gone
    assert "toy/t5, in the hub's cache: T5, 2 + 2 blocks" in " ".join(checked.stdout.split())


def test_only_the_first_rank_writes(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["prepare", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()


# --- what a run makes of it ------------------------------------------------------------------------------------------


def test_runs_on_raw_and_prepared_rows_are_bit_for_bit_the_same(prepared: Path, runs: Runs, tmp_path: Path) -> None:
    """Training, few shots, validation and test, and an evaluation; `runs` has the raw rows."""
    recipe = ["--config", str(runs.source.parent / "recipe.yaml"), "--set", f"data.root={prepared}"]
    source, adapt = tmp_path / "source", tmp_path / "adapt"
    assert main(["source", *recipe, "--run-dir", str(source)]) == 0
    assert main(["adapt", *recipe, "--run-dir", str(adapt), "--particles", str(source)]) == 0
    for run, raw, file in ((source, runs.source, "particles"), (adapt, runs.adapt, "prompt")):
        found, right = (load_file(folder / f"{file}.safetensors") for folder in (run, raw))
        assert set(found) == set(right)
        assert all(torch.equal(found[name], right[name]) for name in right)
        assert (run / "results.json").read_text() == (raw / "results.json").read_text()
        logs = [lines_of(folder / "metrics.jsonl") for folder in (run, raw)]
        outcomes = [[{k: v for k, v in line.items() if not k.startswith(launch.COSTS)} for line in log] for log in logs]
        assert outcomes[0] == outcomes[1]
    answers = []
    for run in (adapt, runs.adapt):
        file = tmp_path / "predictions.jsonl"
        assert main(["evaluate", "--prompt", str(run), "--predictions", str(file)]) == 0
        answers.append(file.read_text())
    assert answers[0] == answers[1]


def test_rows_are_not_tokenised_again_and_are_small(prepared: Path, untied_model: Path, rows: Path) -> None:
    recipe = load_recipe("first_run", ["model.max_source_length=32", "data.labels=digits", f"data.root={prepared}"])
    recipe = recipe.model_copy(update={"source": recipe.source.model_copy(update={"tasks": ["sst2", "cola"]})})
    task, *_ = tasks = every_task(recipe)
    splits = read_splits(recipe, tasks)
    row = splits[0].train[0]
    assert isinstance(row, PreparedRow) and isinstance(row.source_ids, array) and row.source_ids.itemsize == 4
    assert dict(row) == lines_of(rows / "sst2/train.jsonl")[0]
    raw = RowEncoder(AutoTokenizer.from_pretrained(untied_model), recipe.model, recipe.data)
    without = RowEncoder(None, recipe.model, recipe.data)
    assert without.encode_all(task, splits[0].test) == raw.encode_all(task, [dict(row) for row in splits[0].test])
    assert without.encode(task, row) == raw.encode(task, dict(row))


def test_the_matched_set_of_mnli(untied_model: Path, tmp_path: Path, capsys) -> None:
    """Its original splits have other names than those that are cut from them."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "mnli").mkdir(parents=True)
    for split, word in (("train", "a"), ("validation", "good"), ("validation_mismatched", "bad")):
        rows = [{"premise": word, "hypothesis": str(i), "label": i} for i in range(3)]
        (raw / f"mnli/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = ["--config", "first_run", "--set", f"model.name_or_path={untied_model}", "--set", "source.tasks=[]"]
    named += ["--set", "target={tasks: [mnli], steps: 5}", "--set", "data.labels=digits", "--set"]
    assert main(["prepare", *named, f"data.root={raw}", "--out", str(out)]) == 0
    assert [{row["premise"] for row in lines_of(out / f"mnli/{split}.jsonl")} for split in SPLITS] == [
        {"a"}, {"bad"}, {"good"}
    ]  # fmt: skip
    assert main(["check", *named, f"data.root={out}"]) == 0
    assert "train 3, validation 3, test 3" in capsys.readouterr().out


@pytest.mark.shared
def test_real_rows_and_a_real_tokenizer(shared: Path, tmp_path: Path) -> None:
    """Numbers, free text with several answers, text that is cut."""
    model, tasks = shared / "models" / "flan-t5-small-titles", "[rte, stsb, squad, cb]"
    settings = [f"model.name_or_path={model}", f"source.tasks={tasks}", f"data.root={shared / 'data'}"]
    named = [argument for setting in settings for argument in ("--set", setting)]
    out = tmp_path / "out"
    assert main(["prepare", "--config", "first_run", *named, "--out", str(out)]) == 0
    raw_recipe = load_recipe("first_run", settings)
    recipe = load_recipe("first_run", [*settings, f"data.root={out}"])
    encoder = RowEncoder(AutoTokenizer.from_pretrained(model), recipe.model, recipe.data)
    tasks = every_task(recipe)
    for task, found, raw in zip(tasks, read_splits(recipe, tasks), read_splits(raw_recipe, tasks), strict=True):
        assert found == raw
        for prepared_rows, rows in zip(found, raw, strict=True):
            assert encoder.encode_all(task, prepared_rows[::17]) == [encoder.encode(task, row) for row in rows[::17]]


def own_task(folder: Path) -> Path:
    reviews = folder / "reviews"
    reviews.mkdir()
    for split, count in (("train", 40), ("validation", 20)):
        lines = [json.dumps({"text": toy.WORDS[i % 22], "stars": ("bad", "good")[i % 2]}) for i in range(count)]
        (reviews / f"{split}.jsonl").write_text("\n".join(lines))
    return reviews


def test_a_task_of_ones_own_needs_its_folder_no_more(recipe: Path, tmp_path: Path, capsys) -> None:
    reviews, out = own_task(tmp_path), tmp_path / "out"
    own = ["--set", OWN.replace("FOLDER", str(reviews)), "--set", "target.tasks=[reviews]"]
    assert main(["prepare", "--config", str(recipe), *own, "--out", str(out)]) == 0
    definition = json.loads((out / MANIFEST).read_text())["tasks"]["reviews"]["definition"]
    assert definition["source"] == {"review": "text"} and "folder" not in definition
    shutil.rmtree(reviews)
    run = tmp_path / "run"
    command = ["adapt", "--config", str(recipe), *own, "--set", f"data.root={out}", "--particles", "none"]
    assert main([*command, "--run-dir", str(run)]) == 0
    capsys.readouterr()
    with given(b'{"text": "good"}\nawful\n'):
        assert main(["predict", "--prompt", str(run), "--set", "evaluate.scoring=labels"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2 and set(answers) <= {"bad", "good"}
    other = ["--set", "data.tasks.reviews.source={said: text}"]
    assert main([*command, *other, "--run-dir", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'prepared with data.tasks.reviews.source = {"review": "text"}, and the recipe has {"said": "text"}' in line


# --- the folder ------------------------------------------------------------------------------------------------------


def test_overwrite_replaces_what_was_prepared(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    command = ["prepare", "--config", str(recipe), "--out", str(out)]
    assert main(command) == 0
    first = snapshot(out)
    assert main([*command, "--overwrite"]) == 0
    assert snapshot(out) == first
    assert main([*command, "--overwrite", "--set", "source.tasks=[rte]", "--set", "data.labels=words"]) == 0
    assert {path.name for path in out.iterdir()} == {"rte", "mrpc", MANIFEST}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_kill_leaves_nothing_half_and_the_next_run_cleans_up(
    untied_model: Path, tmp_path: Path, tmp_path_factory
) -> None:
    raw = toy.make_rows(tmp_path_factory.mktemp("many"), rows=6000)
    (tmp_path / "recipe.yaml").write_text(toy.recipe_text(untied_model, raw))
    command = launch.plain("prepare", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    draft = tmp_path / ".out.preparing"
    with launch.started(command, tmp_path / "log") as job:
        job.until((draft / "cola").is_dir, "second task")
        job.kill()
    assert draft.is_dir() and not (tmp_path / "out").exists()
    launch.run(command, tmp_path / "log")
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "log", "out"}
    assert (tmp_path / "out" / MANIFEST).is_file()


def test_a_full_disk_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        "from bmtpt_ds.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["prepare", "--config", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env=launch.environment(),
        capture_output=True,
        text=True,
        timeout=launch.LIMIT,
    )
    assert done.returncode == 2
    assert done.stderr == f"bmtpt prepare: --out {tmp_path / 'out'}: cannot be written: File too large\n"
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}
