"""Texts on stdin, answers on stdout: a line each, in UTF-8 whatever the locale says."""

import codecs
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, BinaryIO, TextIO

from bmtpt_ds.errors import UserError

HINT = "type a text a line, then Ctrl-D for the answers"
_ONE_LINE = str.maketrans("\n\r\t", "   ")


def read_lines() -> list[str | dict[str, Any]]:
    """The lines of stdin to its end: a text, or the object of a line that begins with a brace.

    A byte order mark and carriage returns at the ends of lines are left out.

    Raises:
        UserError: nothing there, or a line, by its number, that is empty, not UTF-8 or not JSON.
    """
    if sys.stdin is None:
        raise _nothing()
    if sys.stdin.isatty():
        print(HINT, file=sys.stderr)
    data = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise _nothing()
    lines = data.removesuffix(b"\n").split(b"\n")
    return [_parsed(line.removesuffix(b"\r"), f"line {number}") for number, line in enumerate(lines, start=1)]


def _nothing() -> UserError:
    return UserError("nothing on stdin: give it a text a line, for example from a file with < FILE")


def _parsed(line: bytes, place: str) -> str | dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    if not text.strip():
        raise UserError(f"{place}: empty; remove it, every line gets an answer")
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, brackets without end
        reason = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        mend = 'write one whole object a line; a text that begins with a brace goes into one, {"column": "{ ..."}'
        raise UserError(f"{place}: not valid JSON ({reason}); {mend}") from None


def show(text: str) -> None:
    """Prints a command's outcome on stdout, at once. Who reads it may go before the end (`| head -1`).

    Raises:
        UserError: the disk is full.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with _printing():
        try:
            text.encode(encoding, "surrogateescape")
        except UnicodeEncodeError:  # a locale of few letters
            text = text.encode(encoding, "replace").decode(encoding)
        print(text, flush=True)


def end_output() -> None:
    """Lets go of stdout and stderr before the process ends, which would stumble over what cannot be flushed.

    Raises:
        UserError: as `show`.
    """
    try:
        if sys.stderr is not None:  # None: closed by whoever started us
            sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    with _printing():
        print(end="", flush=True)


@contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise UserError(f"stdout: cannot be written ({error.strerror}); make room on that disk") from None


def _discard(stream: TextIO) -> None:
    """Sends what a stream still holds, and what comes, to nowhere."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def answers_only() -> Iterator[BinaryIO]:
    """Leaves stdout to what is written to the given stream: all else that is printed there goes to stderr.

    DeepSpeed's logger and gloo write to stdout, the one to Python's stream of the moment in which it is imported, the
    other to the process's.
    """
    out = sys.stdout
    if out is None:
        raise UserError("stdout is closed: leave it open for the answers")
    out.flush()
    try:
        descriptor, other = out.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # streams in memory, a closed stderr
        with redirect_stdout(sys.stderr):
            yield out.buffer
        return
    kept = os.dup(descriptor)
    os.dup2(other, descriptor)
    try:
        with redirect_stdout(sys.stderr), open(kept, "wb", buffering=0, closefd=False) as answers:
            yield answers
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def write_answers(out: BinaryIO, lines: Sequence[Sequence[str]]) -> None:
    """Writes lines of answers, tabs between them, at once; line breaks and tabs within an answer become spaces.

    Raises:
        UserError: the disk is full, or whoever read the answers has gone.
    """
    text = "".join("\t".join(answer.translate(_ONE_LINE) for answer in line) + "\n" for line in lines)
    left = memoryview(text.encode("utf-8", "replace"))
    try:
        while left:  # what is not buffered may be taken in parts
            left = left[out.write(left) or 0 :]
    except OSError as error:
        raise UserError(f"stdout: cannot be written ({error.strerror}); the answers from here on are lost") from None
