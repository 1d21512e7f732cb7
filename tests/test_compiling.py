"""A start killed while DeepSpeed compiled leaves torch's lock behind: no later start may wait for it for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bmtpt_ds.parallel import ranks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "py311_cpu/deepspeed_shm_comm/lock"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def _age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds, time.time() - seconds))


def test_an_old_lock_that_nobody_holds_goes(lock: Path) -> None:
    _age(lock, 1000)
    ranks._await_other_compilers()
    assert not lock.exists()


def test_a_young_lock_is_given_the_time_that_compiling_takes(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_COMPILING", 1.5)
    begin = time.monotonic()
    ranks._await_other_compilers()
    assert time.monotonic() - begin > 1
    assert not lock.exists()


def test_a_lock_that_a_process_holds_is_waited_for(lock: Path) -> None:
    _age(lock, 1000)
    code = "import os, sys, time; f = open(sys.argv[1]); print(1, flush=True); time.sleep(1.5); os.remove(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as holder:
        holder.stdout.read(1)
        begin = time.monotonic()
        ranks._await_other_compilers()
        assert time.monotonic() - begin > 1
        assert holder.wait(10) == 0  # it found its lock there
