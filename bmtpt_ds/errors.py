"""The one exception that stands for a mistake of the user's, and what its text offers: a guess, a mend."""

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MENDS = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room, your quota on that disk is used up",
    errno.EROFS: "give a place that can be written",
    errno.EACCES: "give a folder of yours",
    errno.EPERM: "give a folder of yours",
}
UNWRITABLE = frozenset(_MENDS)  # numbers of the OSErrors that say that a place cannot be written
_UNREACHABLE = {
    errno.EACCES: "mend its permissions and those of the folders above it, or give another path",
    errno.EPERM: "mend its permissions, or give another path",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ELOOP: "mend its links",
}


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the thing at fault and the mend; the command line prints it and exits with
    status 2, without a traceback, as it does with a path that is `unreachable`. Everything else that is raised is a
    fault of ours and keeps its traceback.
    """


class RankError(UserError):
    """A mistake that one rank of a job has found alone: that rank says it, whichever it is."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error's text that offers the known name most like `name`; "" where none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def unreachable(error: OSError) -> str | None:
    """What to say of a path that this user cannot even look at; None of every other error."""
    if error.filename is None or error.errno not in _UNREACHABLE:
        return None
    return f"{os.fsdecode(error.filename)}: {error.strerror}; {_UNREACHABLE[error.errno]}"


@contextmanager
def written(what: object, then: str = "") -> Iterator[None]:
    """Around whatever writes `what`: a full disk, a lacking permission and their like become a UserError.

    Args:
        then: what to do when it is mended, behind the mend.
    """
    try:
        yield
    except OSError as error:
        mends = ", ".join(filter(None, [_MENDS.get(error.errno), then]))
        raise UserError(f"{what}: cannot be written: {error.strerror or error}{mends and f'; {mends}'}") from None
