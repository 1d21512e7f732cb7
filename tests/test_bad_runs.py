"""Mistakes about runs: the directory, what lies in it, particles and prompts; and what a shell and a launcher see.

A case breaks one thing of a run that would work; it returns the command line and what the one line on stderr must hold.
"""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bmtpt_ds import cli, quiet
from tests import launch
from tests.mistakes import Bench, Cases, assert_refused, snapshot

case = Cases()

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
    return b.source(), ["--run-dir /proc/bmtpt/run", "cannot be written", "No such file"]


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
def run_dir_in_use(b: Bench):
    shutil.copytree(b.runs.source, b.run_dir)
    b.lock = open(b.run_dir / ".lock", "w")  # noqa: SIM115 - held until the bench goes
    fcntl.flock(b.lock, fcntl.LOCK_EX)
    return b.source("--overwrite"), [f"--run-dir {b.run_dir}", "another process", "wait for it or end it"]


@case
def run_dir_empty(b: Bench):
    b.run_dir.mkdir()
    return b.source("--set", "prompt.length=94"), ["prompt.length 94"]


@case
def overwrite_with_a_mistake_found_late(b: Bench):
    shutil.copytree(b.runs.source, b.run_dir)
    return b.source("--overwrite", "--set", "prompt.length=94"), ["prompt.length 94"]


@case
def json_tensorboard_below_a_file(b: Bench):
    path = b.file("file", "not a folder") / "events"
    json_ = b.json({"tensorboard": {"enabled": True, "output_path": str(path)}})
    return b.source(*json_), ["ds.json: tensorboard.output_path", str(path), "cannot be written", "give a folder"]


@case
def resume_and_overwrite(b: Bench):
    shutil.copytree(b.runs.source, b.run_dir)
    return b.source("--resume", "--overwrite"), ["--resume and --overwrite exclude each other", "give one"]


@case
def resume_with_another_recipe(b: Bench):
    b.interrupted(b.runs.source)
    return b.source("--resume", "--set", "source.lr=0.1"), ["--resume: source.lr differs", "--overwrite"]


@case
def resume_with_another_scoring(b: Bench):
    """The best step so far was chosen by the other one."""
    b.interrupted(b.runs.adapt)
    return b.adapt("--resume", "--set", "evaluate.scoring=labels"), ["--resume: evaluate.scoring differs"]


@case
def resume_of_a_later_version(b: Bench):
    """Whose recipe had a key that is not known here: what it did, nobody can say."""
    config = b.interrupted(b.runs.source) / "config.yaml"
    config.write_text(config.read_text().replace("source:\n", "source:\n  annealing: 3\n", 1))
    return b.source("--resume", "--set", "data.prefix=true"), ["--resume: source.annealing differs"]


@case
def resume_of_before_a_key_existed(b: Bench):
    """What is missing had the default's meaning: it differs from another value, and from that alone."""
    b.interrupted(b.runs.source)
    config = b.run_dir / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if line.strip() not in ("spread: 0.1", "particle_rows: shared")))
    assert len(config.read_text().splitlines()) == len(lines) - 2
    words = ["--resume: source.particle_rows differs", "--overwrite"]
    return b.source("--resume", "--set", "source.particle_rows=own"), words


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
    return b.adapt(particles=run), [str(run), "no particles.safetensors", "finish it first (--resume)"]


@case
def particles_of_an_adaptation(b: Bench):
    return b.adapt(particles=b.runs.adapt), [str(b.runs.adapt), "no particles.safetensors", "`bmtpt source`"]


@case
def particles_from_a_prompt_file(b: Bench):
    path = b.runs.adapt / "prompt.safetensors"
    return b.adapt(particles=path), [str(path), "does not hold what a source stage learned", "`bmtpt source`"]


@case
def particles_from_a_checkpoint(b: Bench):
    path = b.runs.source / "checkpoints/step-00000006.safetensors"
    return b.adapt(particles=path), [str(path), "a checkpoint", "finish its run (--resume) and give its folder"]


@case
def particles_of_another_model(b: Bench):
    expected = [str(b.runs.source), str(b.untied), "weights", str(b.tied), "set model.name_or_path"]
    return b.adapt("--set", f"model.name_or_path={b.tied}"), expected


@case
def particles_of_another_length(b: Bench):
    return b.adapt("--set", "prompt.length=4"), [str(b.runs.source), "have 5 tokens", "--set prompt.length=5"]


@case
def start_at_no_particle(b: Bench):
    return b.adapt("--set", "target.start=3"), ["target.start: 3", str(b.runs.source), "holds 3 particles", "0 to 2"]


@case
def particles_file_not_ours(b: Bench):
    return b.adapt(particles=b.untied / "model.safetensors"), [
        "model.safetensors",
        "not a file of bmtpt_ds",
        "give another run",
    ]


@case
def particles_file_of_text(b: Bench):
    path = b.file("particles.safetensors", "hello")
    return b.adapt(particles=path), [str(path), "damaged", "copy it again"]


@case
def particles_file_altered(b: Bench):
    data = bytearray((b.runs.source / "particles.safetensors").read_bytes())
    data[-1] ^= 1
    path = b.file("particles.safetensors", bytes(data))
    return b.adapt(particles=path), [str(path), "damaged", "SHA-256", "copy it again"]


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
    return b.evaluate("--task", "mprc"), ["unknown task 'mprc'", "did you mean mrpc?"]


@case
def evaluate_task_of_another_prompt(b: Bench):
    return b.evaluate("--task", "rte"), ["--task rte", str(b.runs.adapt), "is for mrpc"]


@case
def evaluate_json_into_a_missing_folder(b: Bench):
    path = b.folder / "nowhere/scores.json"
    return b.evaluate("--json", str(path)), [f"--json {path}", f"{path.parent} does not exist", "make it first"]


@case
def evaluate_json_is_a_folder(b: Bench):
    return b.evaluate("--json", str(b.folder)), [f"--json {b.folder}", "that is a folder", "give a file"]


@case
def evaluate_rows_gone(b: Bench):
    path = b.folder / "nowhere"
    return b.evaluate("--set", f"data.root={path}"), [f"data.root: {path} does not exist"]


@case
def evaluate_with_another_model(b: Bench):
    expected = [str(b.runs.adapt), str(b.untied), "set model.name_or_path"]
    return b.evaluate("--set", f"model.name_or_path={b.tied}"), expected


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)


@pytest.mark.parametrize("name", ["key", "line", "length"])
def test_a_shell_sees_status_2_and_one_line(name: str, bench: Bench) -> None:
    """Found before torch is imported, among the rows, after the model is loaded; library noise goes to stdout."""
    root, named = bench.data()
    if name == "line":
        (root / "cola/train.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": "b\n')
    what, command = {
        "key": ("unknown key source.stpes", bench.source("--set", "source.stpes=3")),
        "line": (f"{root}/cola/train.jsonl:2: not valid JSON (Invalid", bench.source(*named)),
        "length": ("--set prompt.length=5", bench.adapt("--set", "prompt.length=4")),
    }[name]
    before = snapshot(bench.folder)
    done = subprocess.run(
        launch.plain(*command), env=launch.environment(), capture_output=True, text=True, timeout=launch.LIMIT
    )
    assert done.returncode == 2
    (said,) = launch.lines_of(done.stderr)
    assert said.startswith(f"bmtpt {command[0]}: ")
    assert what in said
    assert "Traceback" not in done.stdout
    assert snapshot(bench.folder) == before


def test_a_launcher_passes_status_2_on_and_one_rank_speaks(bench: Bench, tmp_path_factory) -> None:
    root, named = bench.data()
    (root / "cola/validation.jsonl").write_text('{"sentence": "a", "label": 7}\n')
    before = snapshot(bench.folder)
    command = launch.deepspeed(2, "--module", "bmtpt_ds", *bench.source(*named, "--deepspeed_config", "zero3_cpu"))
    said = launch.run(command, tmp_path_factory.mktemp("launcher") / "log", status=2)
    lines = [line for line in said.splitlines() if line.startswith("bmtpt source: ")]
    assert len(lines) == 1, said
    assert f"{root}/cola/validation.jsonl:1: column 'label' must be from 0 to 1" in lines[0]
    assert "Traceback" not in said
    assert snapshot(bench.folder) == before


def test_other_ranks_are_silent_and_let_the_first_one_speak(bench: Bench, capsys, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(quiet.time, "sleep", waited.append)
    assert cli.main(bench.source("--set", "source.stpes=3")) == 2
    assert capsys.readouterr() == ("", "")
    assert len(waited) == 1 and waited[0] > 1  # the launcher looks at its ranks once a second


def test_a_line_break_in_a_name_stays_in_the_line(bench: Bench, capsys) -> None:
    assert cli.main(["evaluate", "--prompt", "two\nlines"]) == 2
    assert capsys.readouterr().err.startswith("bmtpt evaluate: two lines: not a run's directory")
