"""Commands of bmtpt started from here, as people start them: by DeepSpeed's launcher, or as a plain process."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Place:
    """Where the ranks of a job run."""

    ranks: int = 1  # on this machine
    hostfile: Path | None = None  # all its nodes, in place of that
    devices: Sequence[int] = ()  # this machine's GPUs, by number; none: it has none, or all are free
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command line of `bmtpt` there."""
        own = ["bmtpt_ds", *arguments]
        if self.ranks == 1 and self.hostfile is None:
            return [sys.executable, "-m", *own]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_free_port())]
        if self.hostfile is not None:
            return [*launcher, "--hostfile", str(self.hostfile), "--module", "--", *own]
        chosen = ["--include", f"localhost:{','.join(map(str, self.devices))}"] if self.devices else []
        return [*launcher, *(chosen or ["--num_gpus", str(self.ranks)]), "--module", "--", *own]

    def environment(self) -> dict[str, str]:
        ours = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
        alone = {"CUDA_VISIBLE_DEVICES": str(self.devices[0])} if self.ranks == 1 and self.devices else {}
        return {**os.environ, "PYTHONPATH": path, **alone, **self.variables}


@contextmanager
def started(place: Place, arguments: Sequence[str], output: IO[str] | int) -> Iterator[subprocess.Popen]:
    """A job that is gone afterwards; its ranks end when they find their launcher gone (see stopping.py).

    Args:
        output: where all that it prints goes; `subprocess.PIPE` to read it from the job's `stdout`.
    """
    job = subprocess.Popen(
        place.command(arguments),
        env=place.environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield job
    finally:
        job.terminate()
        job.wait()
        if job.stdout is not None:
            job.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
