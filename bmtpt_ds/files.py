"""Files that a person has asked for, or a run leaves: whether they can be written, and how they appear."""

import os
from contextlib import suppress
from pathlib import Path

from bmtpt_ds.errors import UserError, written

TEMPORARY = ".*.tmp"  # names of files that are not complete


def write_atomically(path: Path, data: bytes, then: str = "") -> None:
    """The file appears whole or not at all, whenever the process or the machine dies.

    Raises:
        UserError: the folder cannot be written; `then` is what to do when that is mended.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with written(path, then):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError:
            with suppress(OSError):  # a folder that is not there
                temporary.unlink(missing_ok=True)
            raise


def check_writable(folder: Path, what: str) -> None:
    """Refuses, without touching anything, a folder that could not be made or written in; `what` is where it was said.

    Raises:
        UserError: a file there or above it, no permission, a name that cannot be.
    """
    try:
        nearest = folder
        while not nearest.exists():
            nearest = nearest.parent
        writable = nearest.is_dir() and os.access(nearest, os.R_OK | os.W_OK | os.X_OK)
    except OSError as error:  # a folder above it that may not be looked into, a name too long
        raise UserError(f"{what} {folder}: cannot be written: {error.strerror}; give a folder of yours") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{what} {folder}: that is a file; give a folder")
    if not writable:
        raise UserError(f"{what} {folder}: {nearest} cannot be written; give a folder of yours")


def check_files(files: dict[str, Path | None]) -> None:
    """Refuses, before the work is done, files to be written of which one could not be; by the option that names each.

    Raises:
        UserError: no folder, a folder in its place, no permission, one file for two things.
    """
    taken: dict[Path, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        if not file.parent.is_dir():
            raise UserError(f"{option} {file}: the folder {file.parent} does not exist; make it first")
        if file.is_dir():
            raise UserError(f"{option} {file}: that is a folder; give a file")
        check_writable(file.parent, f"{option} {file}:")
        other = taken.setdefault(file.resolve(), option)
        if other != option:
            raise UserError(f"{option} {file}: that is what {other} writes; give another file")
