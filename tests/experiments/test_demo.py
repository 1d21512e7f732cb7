"""The demo as a person starts it: what it shows, what it leaves behind, what it refuses, how it ends when told to."""

import json
import re
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from statistics import mean, stdev

import pytest

from bmtpt_ds.checkpoint import read_tensors
from bmtpt_ds.cli import main
from bmtpt_ds.experiments.demo import METHODS, SEEDS, TARGETS
from tests.launch import environment, plain, started

LIMIT = 540.0  # seconds; on two idle cores it takes a third of that


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with started(plain("demo", "--out", folder / "out"), folder / "log") as job:
        assert job.wait(LIMIT) == 0, job.text[-4000:]
        return folder / "out", job.text


def _means(scores: dict[str, list[float]]) -> list[float]:
    """Of each seed, over the targets."""
    return [mean(of_seed) for of_seed in zip(*scores.values(), strict=True)]


def test_transfer_beats_a_prompt_from_scratch(demo: tuple[Path, str]) -> None:
    scores = json.loads((demo[0] / "demo.json").read_text())["accuracy"]
    scratch = _means(scores["scratch"])
    for method in ("bmtpt", "single"):
        transferred = _means(scores[method])
        ahead = mean(transferred) - mean(scratch)
        assert ahead > 2 * max(stdev(transferred), stdev(scratch)), scores
        assert ahead > 15, scores


def test_figures_are_those_of_the_runs(demo: tuple[Path, str]) -> None:
    scores = json.loads((demo[0] / "demo.json").read_text())["accuracy"]
    for method in METHODS:
        for task in TARGETS:
            for seed in SEEDS:
                results = json.loads(
                    (demo[0] / "target" / method.name / f"runs/{task}-{seed}/results.json").read_text()
                )
                assert (results["seed"], results["shots"], results["split"]) == (seed, 6, "test")
                assert results["tasks"][task]["score"] == scores[method.name][task][seed]
                assert results["rows_processed"]["target"] == 40 * 6
                assert bool(results["rows_processed"]["source"]) == bool(method.particles)


def test_source_stages_ran_sharded_on_two_ranks(demo: tuple[Path, str]) -> None:
    for name, particles in (("bmtpt", 5), ("single", 1)):
        lines = [json.loads(x) for x in (demo[0] / "source" / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 100
        assert len(lines[0]["losses"]) == particles
        falls = [after < before / 4 for before, after in zip(lines[0]["losses"], lines[-1]["losses"], strict=True)]
        assert all(falls), lines[-1]
        assert list((demo[0] / "source" / name / "tensorboard").glob("events.*"))
    stored = read_tensors(demo[0] / "source/bmtpt/particles.safetensors")
    assert stored.state["ranks"] == 2


def test_a_person_sees_a_table_a_picture_and_what_to_do_next(demo: tuple[Path, str]) -> None:
    folder, text = demo
    scores = json.loads((folder / "demo.json").read_text())["accuracy"]
    for method in METHODS:
        values = _means(scores[method.name])
        row = next(line for line in text.splitlines() if line.startswith(method.title) and "±" in line)
        assert row.endswith(f"{mean(values):.1f} ± {stdev(values):.1f}")
    data = (folder / "demo.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 900 and height > 300 and len(data) < 200_000
    commands = text[text.index("Next:") :].splitlines()[1:4]
    assert [re.findall(r"(tensorboard|bmtpt \w+)", command)[0] for command in commands] == [
        "tensorboard",
        "bmtpt predict",
        "bmtpt source",
    ]
    assert max(map(len, text.replace(str(folder), "runs/demo").splitlines())) < 160 and "Traceback" not in text


def test_the_command_it_names_answers(demo: tuple[Path, str]) -> None:
    texts = ["lovely tiny red soup in the forest", "awful huge blue dog in the kitchen"]
    lines = "".join(f"topic: course text: tomorrow she saw five {text}\n" for text in texts)
    command = plain("predict", "--prompt", demo[0] / "target/bmtpt/runs/course-0")
    done = subprocess.run(command, input=lines, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.split() == ["pass", "fail"], done.stderr


@pytest.mark.slow
def test_told_to_end_it_leaves_no_process(demo: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(demo[0] / "model", tmp_path / "out/model")
    with started(plain("demo", "--out", tmp_path / "out"), tmp_path / "log") as job:
        job.until(lambda: "source 1/100" in job.text, "a step")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 128 + signal.SIGTERM
        job.until_gone(30)
        assert "--resume" not in job.text
    assert not (tmp_path / "out/source/bmtpt/results.json").exists()


def test_a_folder_of_other_things_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "thesis.tex" in line and "another folder" in line and len(line.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_names_only_look_like_a_demos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`bmtpt source --run-dir runs/source`, then `bmtpt demo --out runs`."""
    for name in ("source/config.yaml", "model/mine.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: holds model, but no demo.log" in capsys.readouterr().err
    assert (tmp_path / "source/config.yaml").is_file() and (tmp_path / "model/mine.safetensors").is_file()
