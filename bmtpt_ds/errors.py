"""The one exception that stands for a mistake of the user's, and the guess that its text offers."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the thing at fault and the mend; the command line prints it and exits with
    status 2, without a traceback. Everything else that is raised is a fault of ours and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error's text that offers the known name most like `name`; "" where none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
