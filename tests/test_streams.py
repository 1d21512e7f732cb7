"""stdin, stdout and stderr that are closed, full, or read by someone who goes before the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.mistakes import Bench

TASKS, HELP = ["tasks"], ["--help"]


def environment(buffered: bool = True) -> dict[str, str]:
    return {k: v for k, v in launch.environment().items() if k != "PYTHONUNBUFFERED"} | (
        {} if buffered else {"PYTHONUNBUFFERED": "1"}
    )


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", [TASKS, HELP], ids=lambda command: command[0])
def test_a_reader_that_is_gone_is_no_mistake(command: list[str], buffered: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            launch.plain(*command), env=environment(buffered), stdout=pipe, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("command", "buffered"), [(TASKS, True), (TASKS, False), (HELP, True)], ids=["tasks", "tasks unbuffered", "help"]
)
def test_a_full_disk_behind_stdout(command: list[str], buffered: bool) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            launch.plain(*command), env=environment(buffered), stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("bmtpt") and "stdout: cannot be written (No space left on device); make room" in line


def test_closed_streams() -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *launch.plain("tasks", "sst2")]
    assert subprocess.run(closed, env=environment(), timeout=60).returncode == 0


def test_a_locale_of_few_letters() -> None:
    code = "from bmtpt_ds.commands.text_lines import show; show('62.0 ± 1.5')"
    few = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=few, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"62.0 ? 1.5\n"


def test_a_run_goes_on_when_nobody_watches(bench: Bench) -> None:
    """As with `2>&1 | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            launch.plain(*bench.source()), env=environment(), stdout=pipe, stderr=pipe, timeout=launch.LIMIT
        )
    assert done.returncode == 0
    assert (bench.run_dir / "results.json").is_file()
