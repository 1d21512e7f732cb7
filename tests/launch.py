"""Starting jobs as people do, on CPUs, and ending them: every wait is bounded, every process is ended by its id.

A job is a plain process or `deepspeed` with several ranks. It has a session of its own, so that all its processes are
found even when the one that started them is gone.
"""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ROOT / "tests/distributed/commands.py"
FORKED = ROOT / "tests/distributed/forked.py"
LIMIT = 300.0  # seconds; the longest job takes a fifth of it on two idle cores

# what a launcher, or a test in this process, leaves in the environment
_OF_JOBS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# a command in this process quietens the libraries for its lifetime
_OF_QUIET = ("_VERBOSITY", "_LOG_LEVEL", "_DISABLE_PROGRESS_BARS")

# how keys of a run's log begin that say what its steps took, of time and memory, not what came out
COSTS = ("seconds", "peak_memory")

_WAITS = ("getting DeepSpeed ready", "reading the rows of")


def environment() -> dict[str, str]:
    """This process's environment, for one rank on a CPU, one thread each."""
    ours = {k: v for k, v in os.environ.items() if k not in _OF_JOBS and not k.endswith(_OF_QUIET)}
    return ours | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), ours.get("PATH", "")]),  # ninja lies there
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), ours.get("PYTHONPATH")])),
    }


def plain(*arguments: object) -> list[str]:
    """A command of bmtpt without a launcher."""
    return [sys.executable, "-m", "bmtpt_ds", *map(str, arguments)]


def deepspeed(ranks: int, *what: object) -> list[str]:
    """A script, or `--module` and a module's name, under the launcher, with its arguments."""
    launcher = shutil.which("deepspeed", path=environment()["PATH"])
    assert launcher, "deepspeed's launcher is not installed"
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), *map(str, what)]


def forked(ranks: int, *what: object, port: int | None = None) -> list[str]:
    """As `deepspeed` (`-m` for `--module`) or, with 0 ranks, as python, without the seconds that importing takes: for a
    test that is not about how a job starts. The ranks meet at `port`, default: a free one."""
    return [sys.executable, str(FORKED), "run", str(_server()), str(ranks), str(port or free_port()), *map(str, what)]


@cache
def _server() -> Path:
    """The socket of a process that has imported everything; it ends with this one and takes its folder away."""
    folder = Path(tempfile.mkdtemp(prefix="bmtpt-"))
    path = folder / "socket"
    with (folder / "log").open("wb") as log:
        command = [sys.executable, str(FORKED), "serve", str(path)]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment(), start_new_session=True
        )

    atexit.register(server.stdin.close)  # as the end of this process does
    limit = time.monotonic() + LIMIT
    while not path.exists():
        assert server.poll() is None and time.monotonic() < limit, (folder / "log").read_text()
        time.sleep(0.05)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@cache
def compile_once() -> None:
    """Has DeepSpeed's CPU operator compiled before a test ends a job in the midst of that."""
    command = forked(0, "-c", "from bmtpt_ds.parallel import Ranks; Ranks(600)")
    subprocess.run(command, env=environment(), capture_output=True, timeout=2 * LIMIT, check=True)


class Job:
    """A started command."""

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None):
        compile_once()
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment() | dict(variables or {}),
                start_new_session=True,
            )
        self._known: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Its living processes, orphans included."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._known[child.pid] = child
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid:
                    self._known[process.pid] = process
        return [p for p in self._known.values() if _lives(p)]

    def wait(self, seconds: float = LIMIT) -> int:
        """The exit status of the process that was started; an AssertionError if it goes on for longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text[-4000:]}") from None

    def until(self, condition: Callable[[], bool], what: str, seconds: float = LIMIT) -> None:
        """Waits for a condition, a few milliseconds at a time; an AssertionError when the job ends before it holds."""
        end = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll()
            assert ended is None or condition(), f"ended with {ended} before {what}:\n{self.text[-4000:]}"
            assert time.monotonic() < end, f"no {what} within {seconds} s:\n{self.text[-4000:]}"
            time.sleep(0.005)

    def until_gone(self, seconds: float) -> None:
        """Waits until none of its processes lives."""
        end = time.monotonic() + seconds
        while left := self.members():
            assert time.monotonic() < end, f"{left} left after {seconds} s:\n{self.text[-4000:]}"
            self.process.poll()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to each of its processes."""
        members = self.members()  # before the first dies: a launcher's children are found through it
        for process in members:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        psutil.wait_procs(members, timeout=30)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def started(command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> Iterator[Job]:
    """A job that is gone afterwards, whatever happens; `variables` go on top of `environment`."""
    job = Job(command, log, variables)
    try:
        yield job
    finally:
        job.kill()


def run(
    command: Sequence[str],
    log: Path,
    *,
    status: int = 0,
    variables: Mapping[str, str] | None = None,
    seconds: float = LIMIT,
) -> str:
    """Runs a command to its end, which should have that exit status; what it printed."""
    with started(command, log, variables) as job:
        found = job.wait(seconds)
        assert found == status, f"exit status {found}, not {status}:\n{job.text[-6000:]}"
        return job.text


def lines_of(text: str) -> list[str]:
    """The lines of what a run has printed, but for those of a slow machine: what it waits for."""
    return [line for line in text.splitlines() if not line.startswith(_WAITS)]


def run_commands(
    commands: Sequence[Sequence[object]],
    folder: Path,
    *,
    ranks: int = 0,
    before: Sequence[str] = (),
    seconds: float = LIMIT,
) -> list[dict]:
    """Runs commands of bmtpt one after another in one job, which spares the start of all but the first.

    Args:
        folder: for the list and the outcome.
        ranks: 0: a plain process.
        before: a program that starts a plain process, with its arguments.
        seconds: for all of them.

    Returns:
        for each command what `tests/distributed/commands.py` writes of it.
    """
    folder.mkdir(parents=True)
    plan, outcome = folder / "plan.json", folder / "outcome.json"
    plan.write_text(json.dumps([[str(argument) for argument in command] for command in commands]))
    arguments = [COMMANDS, plan, outcome]
    command = [*before, sys.executable, *map(str, arguments)] if before else forked(ranks, *arguments)
    run(command, folder / "log", seconds=seconds)
    return json.loads(outcome.read_text())
