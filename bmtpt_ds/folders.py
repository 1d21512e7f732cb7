"""A folder that a command fills: it appears whole or not at all, and what others have put there is never lost."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from bmtpt_ds.errors import UserError, written
from bmtpt_ds.files import check_writable
from bmtpt_ds.run_directory import take_lock


def check_out(
    out: Path,
    command: str,
    what: str,
    *,
    mark: Callable[[Path], bool],
    own: Callable[[Path, Path], bool],
    overwrite: bool,
) -> None:
    """Refuses `--out` where it cannot be written or files would be lost.

    Args:
        command: who fills it, `prepare`.
        what: it is filled with, for a person.
        mark: whether a folder that holds something was filled by that command.
        own: whether the command writes such an entry, of its name below `out` and its path.
        overwrite: whether the command's own files may go.

    Raises:
        UserError: no permission; `out` holds anything, but for the command's own files and `overwrite`.
    """
    check_writable(out, "--out")
    check_writable(out.resolve().parent, "--out: the folder above it,")  # it is written beside its name, then renamed
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not mark(out):
        raise UserError(f"--out {out}: holds files that `bmtpt {command}` has not written; give a new folder")
    foreign = [path for path in sorted(out.rglob("*")) if not own(path.relative_to(out), path)]
    if foreign:
        name = foreign[0].relative_to(out)
        raise UserError(f"--out {out}: holds {name}, which `bmtpt {command}` has not written; move it away")
    if not overwrite:
        raise UserError(f"--out {out}: holds {what}; add --overwrite, or give another folder")


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in, which takes its place at the end, and goes where something fails.

    A command that is killed leaves it, hidden; the next one takes it over.
    """
    real = out.resolve()
    draft, old = (real.with_name(f".{real.name}.{what}") for what in ("preparing", "overwritten"))
    with written(f"--out {out}"):
        draft.mkdir(parents=True, exist_ok=True)
        with take_lock(draft, "--out") or nullcontext():
            try:
                for path in draft.iterdir():  # of a run that was killed
                    shutil.rmtree(path) if path.is_dir() else path.name == ".lock" or path.unlink()
                yield draft
                (draft / ".lock").unlink()
                shutil.rmtree(old, ignore_errors=True)
                if real.is_dir() and any(real.iterdir()):
                    real.rename(old)
                draft.rename(real)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        shutil.rmtree(old, ignore_errors=True)
