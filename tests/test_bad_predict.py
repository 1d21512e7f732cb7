"""Mistakes in what `bmtpt predict` is given: lines on stdin, runs, tasks.

A case returns the command line and what the one line on stderr must hold; `input` is what stdin holds.
"""

import re
import shutil

import pytest

from bmtpt_ds.cli import main
from tests.mistakes import Bench, Cases, Runs, assert_refused, given

case = Cases()

# --- lines -----------------------------------------------------------------------------------------------------------


def bad_lines(name: str, data: bytes, *expected: str) -> None:
    """A case that is what stdin holds, for two tasks: mrpc of a run of its own, sst2 of the particles' mean."""

    def make(b: Bench):
        b.input = data
        return [*b.predict(str(b.runs.source), "--task", "mrpc", "sst2")], list(expected)

    case[name] = make


PAIR = b'{"sentence1": "a", "sentence2": "b", "sentence": "c"}\n'
bad_lines("stdin_empty", b"", "nothing on stdin", "< FILE")
bad_lines("stdin_blank", b"\n \n", "nothing on stdin")
bad_lines("line_empty", PAIR + b"\r\n" + PAIR, "line 2: empty", "remove it")
bad_lines(
    "line_torn", PAIR + PAIR + b'{"sentence": "a', "line 3: not valid JSON", "at character 14", "one whole object"
)
bad_lines("line_deep", b'{"a":' * 100_000, "line 1: not valid JSON")
bad_lines("line_in_latin", "été\n".encode("latin-1"), "line 1: not UTF-8 (byte 1", "as UTF-8")
bad_lines("line_with_half_a_pair", b'{"sentence": "\\ud83d", "task": "sst2"}', "line 1: column 'sentence'", "surrogate")
bad_lines("line_with_a_number", b'{"sentence": 5, "task": "sst2"}', "line 1: column 'sentence' must be text, not 5")
bad_lines("line_without_text", b'{"sentence": " ", "task": "sst2"}', "line 1: no text in 'sentence'")
bad_lines("line_lacks_a_column", PAIR + b'{"sentence1": "a", "sentence": "c"}', "line 2: column 'sentence2' is missing")
bad_lines("line_of_no_column", b'{"task": "mrpc"}', "line 1", "'sentence1'", "mrpc needs sentence1, sentence2")
bad_lines("line_for_another_task", b'{"task": "rte"}', "line 1: task 'rte' is not asked", "mrpc, sst2", "--task")
bad_lines("line_for_no_task", b'{"task": ["mrpc"]}', "line 1: task ['mrpc'] is not asked")


# --- runs and tasks --------------------------------------------------------------------------------------------------


@case
def source_without_a_task(b: Bench):
    return b.predict(prompt=b.runs.source), [f"--prompt {b.runs.source}", "say with --task", "sst2, cola"]


@case
def task_misspelt(b: Bench):
    return b.predict("--task", "mprc"), ["unknown task 'mprc'", "did you mean mrpc?"]


@case
def task_of_another_prompt(b: Bench):
    return b.predict("--task", "rte"), ["--task rte", f"{b.runs.adapt} is for mrpc"]


@case
def task_twice(b: Bench):
    return b.predict("--task", "mrpc", "mrpc"), ["mrpc is to be answered twice", "once"]


@case
def prompt_twice(b: Bench):
    return b.predict(str(b.runs.adapt)), ["mrpc is to be answered twice", "each task's prompt once"]


@case
def two_prompts_for_a_task(b: Bench):
    other = b.folder / "other"
    shutil.copytree(b.runs.adapt, other)
    return b.predict(str(other), "--task", "mrpc"), ["--task mrpc", str(b.runs.adapt), str(other), "give one of them"]


@case
def prompts_of_two_models(b: Bench):
    run = b.folder / "other"
    config = b.runs.adapt.parent / "recipe.yaml"
    tasks = ["--set", "target.tasks=[rte]", "--set", f"model.name_or_path={b.tied}"]
    assert main(["adapt", "--config", str(config), "--particles", "none", "--run-dir", str(run), *tasks]) == 0
    expected = [str(b.runs.adapt), str(b.untied), str(run), str(b.tied), "weights differs", "prompts of one model"]
    return b.predict(str(run)), expected


@case
def another_model(b: Bench):
    return b.predict("--set", f"model.name_or_path={b.tied}"), [str(b.untied), "weights", "set model.name_or_path"]


@case
def run_unfinished(b: Bench):
    run = b.interrupted(b.runs.adapt)
    return b.predict(prompt=run), [str(run), "no prompt.safetensors", "--resume"]


@case
def no_run(b: Bench):
    return b.predict(prompt=b.rows), [str(b.rows), "not a run's directory"]


@case
def json_misspelt(b: Bench):
    return b.predict("--deepspeed_config", "zero"), ["zero", "shipped are"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    from bmtpt_ds.commands import predict

    # what can be known of lines and runs is said before the model is loaded
    loads = name in ("another_model",)
    monkeypatch.setattr(predict, "open_session", predict.open_session if loads else None)
    assert_refused(case[name], bench, capsys)


def test_nothing_is_printed_before_a_mistake_in_the_last_line(runs: Runs, capsys) -> None:
    with given(b"a good film\n" * 50 + b"\n\n"):
        assert main(["predict", "--prompt", str(runs.adapt)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"bmtpt predict: line 51: empty; .+\n", err)
