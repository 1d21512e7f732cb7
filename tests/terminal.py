"""A terminal for tests: runs a command on one and says what its screen would show in the end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Screen(NamedTuple):
    lines: list[str]  # as they stand in the end, without spaces at their ends
    wrapped: int  # how often a line ran over the right edge
    written: str  # everything that was written


def run_on_terminal(
    command: Sequence[str], folder: Path, *, columns: int, env: Mapping[str, str], seconds: float
) -> Screen:
    """Runs a command in `folder` whose stdout and stderr are a terminal of that width; it should end with status 0."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)
        except OSError:  # the other end is closed
            pass

    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=dict(env), cwd=folder
    )
    os.close(theirs)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(seconds)
    finally:
        process.kill()
    reader.join(10)
    os.close(ours)
    written = b"".join(chunks).decode()
    assert status == 0, written[-3000:]
    return Screen(*_render(written, columns), written)


def _render(written: str, columns: int) -> tuple[list[str], int]:
    """What a terminal does with carriage returns, line feeds and the cursor's moves upward."""
    rows: list[list[str]] = [[]]
    row = column = wrapped = 0
    for token in re.findall(r"\x1b\[\d*[A-Za-z]|.|\n", written, re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token.startswith("\x1b"):
            assert token.endswith("A"), f"a terminal is asked for {token!r}"
            row = max(0, row - int(token[2:-1] or 1))
        else:
            if column == columns:
                row, column, wrapped = row + 1, 0, wrapped + 1
            rows += [[] for _ in range(row + 1 - len(rows))]
            rows[row] += [" "] * (column + 1 - len(rows[row]))
            rows[row][column] = token
            column += 1
        rows += [[] for _ in range(row + 1 - len(rows))]
    return ["".join(line).rstrip() for line in rows], wrapped
