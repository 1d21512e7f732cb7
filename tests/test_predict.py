"""`bmtpt predict`: the answers are those of `evaluate`, a line a line, in order and alone on stdout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bmtpt_ds.cli import main
from bmtpt_ds.commands.text_lines import HINT, read_lines, write_answers
from bmtpt_ds.errors import UserError
from tests import launch, toy
from tests.mistakes import Runs, given

WORDS = {"mrpc": ("not_equivalent", "equivalent"), "rte": ("entailment", "not_entailment")}


def predicted(capsys, lines: list[str | dict], *arguments: object) -> list[str]:
    """The lines on stdout for lines on stdin; objects as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    capsys.readouterr()
    with given("".join(f"{text}\n" for text in texts).encode()):
        assert main(["predict", "--prompt", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n")
    return out.removesuffix("\n").split("\n")


class Scored(NamedTuple):
    """A test row and what `evaluate` says of it."""

    row: dict
    source: str
    prediction: str


def evaluated(run: Path, task: str, root: Path, folder: Path, *arguments: str) -> list[Scored]:
    """The test rows of a run's evaluation; `root` has them in the order of their files' second halves."""
    file = folder / "predictions.jsonl"
    assert main(["evaluate", "--prompt", str(run), "--task", task, "--predictions", str(file), *arguments]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in (root / task / "validation.jsonl").read_text().splitlines()]
    fields = [name for name in rows[0] if name not in ("label", "idx")]
    by_text = {" ".join(f"{name}: {row[name]}" for name in fields): row for row in rows}
    return [Scored(by_text[one["source"]], one["source"], one["prediction"]) for one in found]


@pytest.fixture(scope="module")
def third(tmp_path_factory, untied_model: Path, rows: Path) -> Path:
    """A prompt for rte that differs from the other runs in length, label words and in how a row is cut."""
    folder = tmp_path_factory.mktemp("third")
    (folder / "recipe.yaml").write_text(toy.recipe_text(untied_model, rows))
    changed = ("target.tasks=[rte]", "prompt.length=3", "data.labels=words", "data.prefix=true", "run.seed=5")
    changed += ("model.max_source_length=9",)
    arguments = [a for change in changed for a in ("--set", change)]
    run = folder / "run"
    command = ["adapt", "--config", str(folder / "recipe.yaml"), "--particles", "none", "--run-dir", str(run)]
    assert main([*command, *arguments]) == 0
    return run


@pytest.mark.parametrize("scoring", ["generate", "labels"])
def test_answers_are_those_of_evaluate(runs: Runs, rows: Path, tmp_path: Path, capsys, scoring: str) -> None:
    how = ("--set", f"evaluate.scoring={scoring}")
    scored = evaluated(runs.adapt, "mrpc", rows, tmp_path, *how)
    assert len(scored) == 15
    words = dict(enumerate(WORDS["mrpc"]))
    right = [words[int(s.prediction)] if s.prediction in ("0", "1") else s.prediction for s in scored]
    if scoring == "labels":
        assert set(right) <= set(WORDS["mrpc"])
    unlabelled = [{key: value for key, value in s.row.items() if key != "label"} for s in scored]
    assert predicted(capsys, unlabelled, runs.adapt, *how) == right
    # the hub's test rows have -1 in place of a label
    assert predicted(capsys, [{**s.row, "label": -1} for s in scored], runs.adapt, *how) == right
    assert predicted(capsys, [s.source for s in scored], runs.adapt, *how) == right


def test_a_text_goes_into_the_only_field_and_the_particles_mean_answers(
    runs: Runs, rows: Path, tmp_path: Path, capsys
) -> None:
    scored = evaluated(runs.source, "sst2", rows, tmp_path)
    assert predicted(capsys, [s.row["sentence"] for s in scored], runs.source, "--task", "sst2") == [
        {"0": "negative", "1": "positive"}.get(s.prediction, s.prediction) for s in scored
    ]


def test_several_tasks_answer_in_the_order_asked(runs: Runs, third: Path, rows: Path, tmp_path: Path, capsys) -> None:
    """Prompts of two lengths, two label styles, two scorings and two cuts of the text, in the same batches."""
    labels = ("--set", "evaluate.scoring=labels")
    pairs = [s.row for s in evaluated(runs.adapt, "mrpc", rows, tmp_path)]
    for how in ((), labels, ("--set", "evaluate.batch_size=4")):
        one = predicted(capsys, pairs, runs.adapt, *how)
        two = predicted(capsys, pairs, third, *how)
        assert set(one) != set(two)
        if how == labels:
            assert set(one) <= set(WORDS["mrpc"]) and set(two) <= set(WORDS["rte"])
        both = predicted(capsys, pairs, third, runs.adapt, *how)
        assert both == [f"{t}\t{o}" for t, o in zip(two, one, strict=True)]
        both = predicted(capsys, pairs, third, runs.adapt, "--task", "mrpc", "rte", *how)
        assert both == [f"{o}\t{t}" for t, o in zip(two, one, strict=True)]
    named = [{**pair, "task": ("mrpc", "rte")[i % 2]} for i, pair in enumerate(pairs)]
    right = [(one, two)[i % 2][i] for i in range(len(pairs))]
    assert predicted(capsys, named, third, runs.adapt) == right


def test_one_task_of_a_run_that_knows_scoring_by_labels(runs: Runs, third: Path, capsys, tmp_path: Path) -> None:
    """Each run's own scoring holds."""
    by_labels = tmp_path / "by labels"
    shutil.copytree(third, by_labels)
    config = by_labels / "config.yaml"
    config.write_text(config.read_text().replace("scoring: generate", "scoring: labels"))
    text = ["sentence1: a good film sentence2: the dog likes"]
    alone = [predicted(capsys, text, run)[0] for run in (by_labels, runs.adapt)]
    assert alone[0] in WORDS["rte"]
    assert predicted(capsys, text, by_labels, runs.adapt) == ["\t".join(alone)]


def test_a_line_for_a_line_in_order(runs: Runs, capsys) -> None:
    """More lines than are answered at once, of all lengths, equal ones too."""
    words = toy.WORDS[:22]
    texts = [" ".join(words[i % 22] for i in range(n, n + 1 + n % 7)) for n in range(45)]
    how = ("--task", "sst2", "--set", "evaluate.batch_size=2")
    found = predicted(capsys, texts, runs.source, *how)
    assert len(found) == 45 and len(set(found)) > 1
    assert found[30:33] == predicted(capsys, texts[30:33], runs.source, *how)
    assert predicted(capsys, texts[::-1], runs.source, *how) == found[::-1]


def test_a_process_prints_answers_alone_on_stdout_whatever_the_locale(runs: Runs, capsys) -> None:
    """The byte order mark and the carriage returns of other systems' editors; libraries' talk."""
    lines = ["a good film", "l'été \u2028 déjà", {"sentence": "{ an awful film }"}]
    right = predicted(capsys, lines, runs.source, "--task", "cola")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    done = subprocess.run(
        launch.plain("predict", "--prompt", runs.source, "--task", "cola", "--verbose"),
        input=b"\xef\xbb\xbf" + "\r\n".join(texts).encode(),
        env=launch.environment() | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=launch.LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines() == right
    assert b"Traceback" not in done.stderr


def test_a_signal_ends_it_between_whole_lines(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a good film\n" * 20_000)
    command = launch.plain("predict", "--prompt", runs.source, "--task", "sst2", "--set", "evaluate.batch_size=1")
    with (
        (tmp_path / "texts").open() as texts,
        (tmp_path / "answers").open("wb") as answers,
        subprocess.Popen(
            command, stdin=texts, stdout=answers, stderr=subprocess.PIPE, env=launch.environment(), text=True
        ) as process,
    ):
        try:
            end = time.monotonic() + launch.LIMIT
            while not (tmp_path / "answers").stat().st_size and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=launch.LIMIT)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "bmtpt predict: stopped by SIGINT"
    assert "Traceback" not in said
    lines = (tmp_path / "answers").read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 20_000
    assert set(lines) == {lines[0]} and lines[0].endswith("\n")


# --- stdin and stdout ------------------------------------------------------------------------------------------------


def test_a_person_at_a_terminal_is_told_what_to_do(monkeypatch, capsys) -> None:
    master, slave = os.openpty()
    with open(slave, encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, b"a good film\n\x04")
        assert read_lines() == ["a good film"]
    os.close(master)
    assert capsys.readouterr() == ("", f"{HINT}\n")


def test_answers_are_utf8_and_keep_to_their_line(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb", buffering=0) as out:
        write_answers(out, [["été\n", "a\tb"], ["日本"]])
        write_answers(out, [[""]])
    assert (tmp_path / "out").read_bytes() == "été \ta b\n日本\n\n".encode()


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with (
        open(writing, "wb", buffering=0) as out,
        pytest.raises(UserError, match=r"^stdout: cannot be written \(Broken pipe\); .+ are lost$"),
    ):
        write_answers(out, [["equivalent"]])
