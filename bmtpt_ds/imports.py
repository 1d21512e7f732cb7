"""Importing torch, transformers and DeepSpeed in less time."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around imports of heavy libraries, at the start of a process: the garbage collector rests and then forgets them.

    They make 700,000 objects that stay. To look through these again and again was a sixth of the time of importing.
    """
    if "torch" in sys.modules or not gc.isenabled():  # the process is somebody else's
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # else libraries report at the end what was not collected
    finally:
        gc.enable()
