"""What a person reads: help, mistakes on the command line, what the libraries may say, how far a run is."""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bmtpt_ds
from bmtpt_ds import quiet
from bmtpt_ds.arguments import Parser
from bmtpt_ds.cli import command_line, main
from bmtpt_ds.progress import Pass
from bmtpt_ds.readable import duration, readable_bytes
from tests import launch
from tests.terminal import run_on_terminal

COMMANDS = list(command_line().commands)


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_hundred_columns(command: str, capsys, monkeypatch) -> None:
    for columns in ("100", "200", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        assert ended([*filter(None, [command]), "--help"]) == 0
        out, err = capsys.readouterr()
        assert not err
        lines = [line for line in out.splitlines() if "bmtpt" not in line]  # examples stay whole
        assert max(map(len, lines)) <= min(100, int(columns))
        assert "--verbose" in out and "Example" in out
    assert {"source", "adapt", "evaluate", "predict", "prepare", "check", "tasks"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_of_every_option_its_default_or_that_it_is_required(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ended([command, "--help"])
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    said = {entry.split()[0]: " ".join(entry.split("\n\n")[0].split()) for entry in entries[1:]}
    actions = [a for a in command_line().commands[command]._actions if a.option_strings and a.help != argparse.SUPPRESS]
    for action in actions:
        if action.nargs == 0:  # what is not given is not done
            continue
        text = said[action.option_strings[0]]
        assert ("(required)" in text) == action.required, text
        assert action.required or "(default: " in text, text
        assert len(text) > len(action.option_strings[0]) + 20


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_run(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ended([command, "--help"])
    out = capsys.readouterr().out
    parser = command_line()
    examples = parser.commands[command].examples
    assert examples
    for example in examples:
        assert f"  {example}\n" in out
        words = shlex.split(re.split(r"\s[<>]\s", example.rpartition("| ")[2])[0])
        if words[0] != "bmtpt":
            program = words.index("bmtpt_ds")
            assert words[0] == "deepspeed" and "--module" in words[:program]
            words = words[program:]
        options = parser.parse_args(words[1:])
        assert options.command in COMMANDS
    assert command in examples[0].split()


def test_help_names_units(capsys) -> None:
    ended(["evaluate", "--help"])
    assert "0 to 100" in capsys.readouterr().out


def test_version(capsys) -> None:
    assert ended(["--version"]) == 0
    assert capsys.readouterr().out == f"bmtpt_ds {bmtpt_ds.__version__}\n"


# --- mistakes on the command line ------------------------------------------------------------------------------------

SOURCE = ["source", "--config", "first_run", "--run-dir", "x"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "bmtpt: the following arguments are required: COMMAND (see bmtpt --help)"),
        (["sauce"], "bmtpt: unknown command 'sauce': did you mean source? (see bmtpt --help)"),
        (["xyzzy"], f"bmtpt: unknown command 'xyzzy'; there are {', '.join(COMMANDS)} (see bmtpt --help)"),
        (["--verbos", "source"], "bmtpt: unknown option --verbos: did you mean --verbose? (see bmtpt --help)"),
        (["source", "--config", "a"], "bmtpt source: the following arguments are required: --run-dir (see"),
        (["source", "--config", "a", "--run_dir=x"], "bmtpt source: unknown option --run_dir: did you mean --run-dir?"),
        (["source", "--confg", "a", "--run-dir", "x"], "bmtpt source: unknown option --confg: did you mean --config?"),
        (
            [*SOURCE, "--resum"],
            "bmtpt source: unknown option --resum: did you mean --resume? (see",
        ),
        ([*SOURCE, "-v"], "bmtpt source: unknown option -v"),
        (
            [*SOURCE, "--set", "source.lr=1", "run.seed=2"],
            "'run.seed=2' belongs to no option; repeat --set before",
        ),
        ([*SOURCE, "stray"], "bmtpt source: 'stray' belongs to no option (see bmtpt source --help)"),
        ([*SOURCE, "--set"], "bmtpt source: argument --set: expected one argument (see bmtpt source --help)"),
        (["adapt", "--config", "a", "--run-dir", "x"], "arguments are required: --particles (see bmtpt adapt --help)"),
        (["evaluate", "--prompt", "x", "--split", "train"], "--split: invalid choice: 'train' (choose from"),
        (["evaluate", "--prompt", "x", "--nonsense"], "bmtpt evaluate: unknown option --nonsense (see"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments, said: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_of_several_ranks_the_first_one_speaks(rank: str, capsys, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(quiet.time, "sleep", waited.append)
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)  # left by a run in this process
    monkeypatch.setenv(rank, "1")
    assert ended(["sauce"]) == 2
    assert len(waited) == 1 and waited[0] > 1  # the launcher looks at its ranks once a second
    assert ended(["source", "--help"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv(rank, "0")
    assert ended(["sauce"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(waited) == 1


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local_rank", "1"], ["--verbose"]])
def test_what_goes_before_and_behind_a_command(words: list[str]) -> None:
    for line in ([*words, *SOURCE], [*SOURCE, *words]):
        options = command_line().parse_args(line)
        assert options.command == "source"
        assert getattr(options, "verbose", False) == ("--verbose" in words)


def test_values_may_look_like_commands_or_numbers() -> None:
    line = ["--local_rank", "0", "evaluate", "--prompt", "source", "--task", "adapt", "-3", "--set", "a=-1"]
    options = command_line().parse_args(line)
    assert (options.command, options.task, options.set) == ("evaluate", ["adapt", "-3"], ["a=-1"])


def test_help_of_a_parser_of_ones_own(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    parser = Parser(prog="toy")
    command = parser.add_command("run", print, "run it", "toy run --rate 2", "toy run", more="A paragraph. " * 12)
    command.add_argument("--rate", type=float, default=1.5, help="steps a second")
    with pytest.raises(SystemExit):
        parser.parse_args(["run", "--help"])
    out = capsys.readouterr().out
    assert "steps a second (default: 1.5)\n" in out
    assert "Run it.\n" in out
    assert "\nExamples:\n  toy run --rate 2\n  toy run\n" in out
    assert max(map(len, out.splitlines())) <= 100


# --- what the libraries may say --------------------------------------------------------------------------------------

TALK = """
import sys
from bmtpt_ds.quiet import quieten
quieten(verbose="verbose" in sys.argv)
import logging, warnings
import huggingface_hub, datasets
from transformers.utils import logging as transformers_logging
warnings.warn("an old name", FutureWarning)
warnings.warn("the driver is\\ntoo old")
transformers_logging.get_logger("transformers.models").warning("a hint")
transformers_logging.get_logger("transformers.models").error("a failure")
logging.getLogger("datasets.load").warning("a cache is used")
logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
logging.getLogger("huggingface_hub.utils._http").warning("Rate limited. Waiting 60s")
"""


@pytest.mark.parametrize(
    "words, variables, expected",
    [
        ([], {}, {"the driver", "a failure", "Rate limited"}),
        ([], {"LOCAL_RANK": "1", "RANK": "1"}, {"a failure", "Rate limited"}),
        ([], {"TRANSFORMERS_VERBOSITY": "warning"}, {"the driver", "a failure", "Rate limited", "a hint"}),
        ([], {"PYTHONWARNINGS": "default"}, {"the driver", "a failure", "Rate limited", "an old name"}),
        (
            ["verbose"],
            {"LOCAL_RANK": "1", "RANK": "1"},
            {"the driver", "a failure", "Rate limited", "an old name", "a hint", "a cache", "Retrying"},
        ),
    ],
)
def test_libraries_say_what_matters_or_everything(words, variables, expected: set[str]) -> None:
    # what commands in this process have left in the environment would count as the user's wish
    before = launch.environment()
    done = subprocess.run(
        [sys.executable, "-c", TALK, *words],
        env=before | variables,
        capture_output=True,
        text=True,
        timeout=launch.LIMIT,
    )
    assert done.returncode == 0, done.stderr
    everything = {"the driver", "a failure", "Rate limited", "an old name", "a hint", "a cache", "Retrying"}
    assert {text for text in everything if text in done.stderr} == expected
    if not words and not variables:
        assert "warning: the driver is too old (<string>:9)\n" in done.stderr


LOOK = """
import sys
from bmtpt_ds.quiet import quieten
quieten(verbose="verbose" in sys.argv)
from deepspeed.accelerator import get_accelerator
assert get_accelerator().device_name() == "cpu"
"""


@pytest.mark.parametrize(
    ("words", "driver", "news"), [([], False, False), ([], True, True), (["verbose"], False, True)]
)
def test_a_cpu_is_news_where_a_gpu_s_driver_is(words: list[str], driver: bool, news: bool, tmp_path: Path) -> None:
    if driver:
        (tmp_path / "nvidia-smi").touch(0o755)
    variables = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment = {key: value for key, value in launch.environment().items() if key != "DS_ACCELERATOR"} | variables
    command = [sys.executable, "-c", LOOK, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=launch.LIMIT)
    assert done.returncode == 0, done.stderr
    assert ("Setting accelerator to CPU" in done.stdout + done.stderr) == news


def test_verbose_shows_what_the_libraries_say(recipe: Path, tmp_path: Path) -> None:
    command = launch.plain("source", "--verbose", "--config", recipe, "--run-dir", tmp_path / "run")
    said = launch.run(command, tmp_path / "log")
    assert "DeepSpeedEngine configuration" in said
    assert "[transformers] Model config T5Config" in said
    assert f"source into {tmp_path}/run: 6 steps" in said


# --- how far a run is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, said",
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (90, "2 min"), (3569, "59 min"), (3571, "1 h"),
        (3720, "1 h 2 min"), (47 * 3600, "47 h"), (48 * 3600, "2 days"), (76.2 * 3600, "3 days 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    "count, said",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (307_400_000, "307 MB"),
        (11_350_000_000, "11.3 GB"),
    ],
)
def test_bytes(count: int, said: str) -> None:
    assert readable_bytes(count) == said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86's list of instructions")
def test_a_cpu_without_instructions_for_bfloat16_is_said(recipe: Path, tmp_path: Path, capsys) -> None:
    """oneDNN has bfloat16 for AVX-512 and AVX-NE-CONVERT; without them a plain loop of torch takes its place."""
    settings = ["--set", "model.dtype=bfloat16", "--set", "source.steps=1", "--set", "source.warmup_steps=0"]
    assert main(["source", "--config", str(recipe), "--run-dir", str(tmp_path / "run"), *settings]) == 0
    (model,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("model "))
    flags = set(Path("/proc/cpuinfo").read_text().split())
    has = flags >= {"avx512bw", "avx512vl", "avx512dq"} or "avx_ne_convert" in flags
    assert ("bfloat16, on" in model) == has and ("bfloat16 (tens of times slower" in model) != has, model


def test_plain_lines_say_what_the_metrics_say(recipe: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["source", "--config", str(recipe), "--run-dir", str(run), "--set", "source.eval_every=4"]) == 0
    out, err = capsys.readouterr()
    said = launch.lines_of(err)
    head, lines = said[:5], said[5:]
    assert out == ""
    assert head[0] == f"source into {run}: 6 steps, 3 particles of 5 x 32"
    assert head[1] == "rows (train + validation + test): sst2 60 + 15 + 15, cola 60 + 15 + 15"
    assert re.fullmatch(r"model \S+: 55,936 parameters, float32, on 1 cpu rank", head[2])
    assert head[3] == "activations kept: a micro-batch of 12 rows fits"
    assert head[4] == "SVGD: reference, in torch on cpu"
    assert lines[-1] == f"source: 6 steps done, 3 particles of 5 x 32 in {run}/particles.safetensors"
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(written) == len(lines) - 1 == 5
    for values, line in zip(written, lines, strict=False):
        assert line.startswith(f"source {values['step']}/6  ")
        if "validation" in values:
            shown = "  ".join(f"{k} {v:.1f}" for k, v in values["validation"].items())
            assert line.endswith(f"validation: {shown}  (majority class {values['majority']['mean']:.1f})")
            continue
        lowest, highest = min(values["losses"]), max(values["losses"])
        assert f"  loss {values['loss']:.4g} ({lowest:.3g} to {highest:.3g})  " in line
        for name, key in (("kernel", "kernel_mean"), ("drive", "drive_norm"), ("repulsion", "repulsion_norm")):
            assert f"  {name} {values[key]:.3g}  " in line
        assert f"  {values['seconds']:.3g} s/step" in line
        left = "done" if values["step"] == 6 else f"{duration(values['seconds'] * (6 - values['step']))} left"
        assert f"  {left}  " in line


def test_bfloat16_changes_nothing_about_what_is_printed(recipe: Path, tmp_path: Path, capfd) -> None:
    run = ["source", "--config", str(recipe), "--run-dir", str(tmp_path / "run"), "--set", "model.dtype=bfloat16"]
    assert main([*run, "--set", "source.steps=2"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert len(launch.lines_of(err)) == 5 + 2 + 1


def test_the_plain_lines_of_an_adaptation(runs, tmp_path: Path, recipe: Path, capsys) -> None:
    named = ["--config", str(recipe), "--particles", str(runs.source), "--run-dir", str(tmp_path / "run")]
    assert main(["adapt", *named]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^adapt 2/6  \d+ s left  loss \S+  prior \S+  \S+ s/step$", err, re.M)
    assert re.search(
        r"^adapt 6/6  validation: mrpc \d+\.\d  \(best \d+\.\d at step [36], majority class 53\.3\)$", err, re.M
    )


def test_a_run_on_a_terminal(recipe: Path, tmp_path: Path) -> None:
    steps = ["--set", "source.steps=40", "--set", "source.eval_every=20", "--set", "run.log_every=5"]
    command = launch.plain("source", "--config", recipe, "--run-dir", "run", *steps)
    screen = run_on_terminal(command, tmp_path, columns=100, env=launch.environment(), seconds=launch.LIMIT)
    assert screen.wrapped == 0
    assert launch.lines_of("\n".join(screen.lines))[0] == "source into run: 40 steps, 3 particles of 5 x 32"
    validations = [line for line in screen.lines if "validation: " in line]
    assert [line.split()[1] for line in validations] == ["20/40", "40/40"]
    bars = [line for line in screen.lines if line.startswith("source |")]
    assert len(bars) == 1
    figures = r"40/40, done, loss \S+, kernel \S+, drive \S+, rep \S+, \S+ s/step"
    assert re.fullmatch(rf"source \|\S+\| {figures}", bars[0])
    assert re.search(r"\| \d+/40, \d+ s left, loss ", screen.written)
    assert screen.lines[-2:] == ["source: 40 steps done, 3 particles of 5 x 32 in run/particles.safetensors", ""]


NESTED = """
import time
from bmtpt_ds import progress
progress._BAR_AFTER = 0.2
bar = progress.open_bar("run", 4, shown=True)
for step in range(4):
    with progress.Pass("answering toy", 40, shown=True) as answered:
        for _ in range(20):
            time.sleep(0.02)
            answered.advance(2)
            with answered.aside():
                print("an answer", flush=True) if step == 1 else None
    bar.update(1)
bar.close()
with progress.Pass("brief", 3, shown=True) as brief:
    brief.advance(3)
"""


def test_a_pass_on_a_terminal_leaves_nothing_behind() -> None:
    command = [sys.executable, "-c", NESTED]
    screen = run_on_terminal(command, launch.ROOT, columns=60, env=launch.environment(), seconds=60)
    assert screen.wrapped == 0
    assert re.search(r"answering toy \|[^|]+\| \d+/40, \d s left", screen.written)
    assert "brief" not in screen.written
    assert not [line for line in screen.lines if "answering" in line]
    assert [line for line in screen.lines if line] == ["an answer"] * 20 + [screen.lines[20]]
    assert screen.lines[20].startswith("run |") and screen.lines[20].endswith("| 4/4")


def test_a_pass_elsewhere_says_a_line_now_and_then(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bmtpt_ds.progress.time.monotonic", lambda: now[0])
    for shown in (True, False):
        now[0] = 0.0
        with Pass("answering mrpc", 1000, shown=shown) as answered:
            for _ in range(10):  # 8 s a hundred
                now[0] += 8.0
                answered.advance(100)
        expected = ["answering mrpc 200 of 1000  1 min left", "answering mrpc 600 of 1000  32 s left"]
        assert capsys.readouterr().err.splitlines() == (expected if shown else [])


def test_what_takes_long_is_explained(capsys) -> None:
    with quiet.say_if_longer("waiting for 2 ranks", 0.05):
        quiet.time.sleep(0.5)
    with quiet.say_if_longer("not said"):
        pass
    assert capsys.readouterr().err == "waiting for 2 ranks\n"
