"""Who speaks, and what of the libraries' talk is let through: the terminal belongs to the run.

`quieten` comes before any heavy library is imported: most of them read their verbosity from the environment then.
"""

import io
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress

from bmtpt_ds.errors import UNWRITABLE

# seconds: a launcher ends all ranks once one of them has failed, and only the first one says why
_LET_FIRST_SPEAK = 5.0
_LOGGER = logging.getLogger("bmtpt_ds")  # its level is what --verbose decides
# of each library: the environment's variable, its value by default and with --verbose
_VERBOSITY = {
    "TRANSFORMERS_VERBOSITY": ("error", "info"),
    "DATASETS_VERBOSITY": ("error", "info"),
    "HF_HUB_VERBOSITY": ("error", "info"),
    "TORCH_CPP_LOG_LEVEL": ("ERROR", "WARNING"),
    "KINETO_LOG_LEVEL": ("6", "3"),  # torch.profiler's library
}
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its job, as the launcher's environment says; alone it is."""
    return _is_zero("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def let_first_rank_speak() -> None:
    """Waits, on a rank that is about to fail without a word, until rank 0 has said what is wrong."""
    time.sleep(_LET_FIRST_SPEAK)


def say(text: str) -> None:
    """A sentence to the person who watches, from rank 0."""
    if is_first_rank():
        print_line(text)


def print_line(text: str) -> None:
    """A line on stderr from any rank. That nobody can read it, the reader of a pipe being gone, ends no run."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def hush() -> AbstractContextManager:
    """Inside, what DeepSpeed prints where it should log is not seen, unless everything is."""
    return nullcontext() if is_verbose() else redirect_stdout(io.StringIO())


@contextmanager
def say_if_longer(text: str, seconds: float = 10.0) -> Iterator[None]:
    """Says what is going on if it takes longer than that."""
    timer = threading.Timer(seconds, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_verbose() -> bool:
    """Whether `quieten` was asked to let everything through."""
    return _LOGGER.isEnabledFor(logging.INFO)


def quieten(*, verbose: bool) -> None:
    """Sets how much the libraries print that are imported from now on; what the user has set in the environment stays.

    Args:
        verbose: everything, on all ranks. Else errors, and on the first rank of a node warnings that a user can act on.
    """
    _LOGGER.setLevel(logging.INFO if verbose else logging.WARNING)
    for variable, levels in _VERBOSITY.items():
        os.environ.setdefault(variable, levels[verbose])
    if not sys.warnoptions:
        _filter_warnings(verbose)
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _of_a_thread
    if not verbose:
        for variable in _BARS:
            os.environ.setdefault(variable, "1")
        # minutes of waiting that a hub has asked for are to be known
        waits = logging.getLogger("huggingface_hub.utils._http")
        waits.setLevel(logging.WARNING)
        waits.addFilter(_is_of_waiting)
        # a CUDA build of torch on a machine without GPU is no news
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        logging.getLogger("DeepSpeed").addFilter(_is_news)  # before DeepSpeed, which looks for a GPU while imported


def _filter_warnings(verbose: bool) -> None:
    if verbose:
        warnings.simplefilter("default")
        return
    if not _is_zero("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"):
        warnings.simplefilter("ignore")
        return
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):  # for those who write libraries
        warnings.simplefilter("ignore", category)
    warnings.formatwarning = _one_line


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None):
    return f"warning: {' '.join(str(message).split())} ({os.path.basename(filename)}:{lineno})\n"


def _of_a_thread(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread that could not write also hands its error to the run, which says it in one line."""
    if getattr(failure.exc_value, "errno", None) not in UNWRITABLE:
        threading.__excepthook__(failure)


def _is_of_waiting(record: logging.LogRecord) -> bool:
    return record.getMessage().startswith("Rate limited")


def _is_news(record: logging.LogRecord) -> bool:
    """All but that ranks run on CPUs where there is no GPU for them: a run says what it runs on."""
    return not record.getMessage().startswith("Setting accelerator to CPU") or shutil.which("nvidia-smi") is not None


def _is_zero(*names: str) -> bool:
    return next((os.environ[n] for n in names if n in os.environ), "0") == "0"
