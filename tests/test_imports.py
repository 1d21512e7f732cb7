"""The garbage collector rests while heavy libraries are imported, in a process of ours."""

import gc
import subprocess
import sys

import pytest

from bmtpt_ds.imports import quick_imports

OURS = """
import gc
from bmtpt_ds.imports import quick_imports
try:
    with quick_imports():
        print(gc.isenabled(), gc.get_freeze_count())
        {what}
except ZeroDivisionError:
    pass
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""


@pytest.mark.parametrize(("what", "forgets"), [("import email", True), ("1 / 0", False)])
def test_it_works_again_afterwards(what: str, forgets: bool) -> None:
    command = [sys.executable, "-c", OURS.format(what=what)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["False 0", f"True {forgets}"]


def test_a_process_that_has_torch_is_left_alone() -> None:
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before
