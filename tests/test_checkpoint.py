from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bmtpt_ds.checkpoint import Checkpoints, Damaged, read_tensors, write_tensors
from bmtpt_ds.errors import UserError
from bmtpt_ds.files import write_atomically

TENSORS = {"particles": torch.randn(3, 4, 5), "step": torch.tensor(7), "half": torch.randn(3).bfloat16()}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", TENSORS, {"step": 7, "names": ["x"]})
    stored = read_tensors(tmp_path / "a.safetensors")
    assert stored.state == {"step": 7, "names": ["x"]}
    assert stored.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(stored.tensors[n], t) and stored.tensors[n].dtype == t.dtype for n, t in TENSORS.items())


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_of_later_steps_go_before_sound_ones(tmp_path: Path, keep: int) -> None:
    """A run that goes on behind them has given them up; killed again, it finds what it has written since."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20):
        checkpoints.save(step, {"x": torch.tensor([float(step)])}, {})
    (tmp_path / "step-00000020.safetensors").write_bytes(b"")
    assert checkpoints.load_latest()[0].state["step"] == 10
    checkpoints = Checkpoints(tmp_path, keep)
    checkpoints.save(15, {"x": torch.tensor([15.0])}, {})
    assert checkpoints.load_latest()[0].state["step"] == 15
    assert len(list(tmp_path.iterdir())) == keep


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"step": 7})
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        # an altered name or spare byte of the header may read back the same tensors under other names: still damaged
        with pytest.raises(Damaged, match=r"a\.safetensors"):
            read_tensors(path)
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read_tensors(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "foreign.safetensors")
    with pytest.raises(Damaged, match="not a file of bmtpt_ds"):
        read_tensors(tmp_path / "foreign.safetensors")


def test_keeps_the_last_ones_and_falls_back_when_the_newest_is_damaged(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.load_latest() == (None, [])
    for step in (2, 4, 6):
        checkpoints.save(step, {"x": torch.tensor([float(step)])}, {})
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [f.name for f in files] == ["step-00000004.safetensors", "step-00000006.safetensors"]
    files[1].write_bytes(files[1].read_bytes()[:-1])
    stored, refused = checkpoints.load_latest()
    assert stored.state["step"] == 4
    assert len(refused) == 1
    assert "step-00000006" in refused[0]
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match="no sound checkpoint"):
        checkpoints.load_latest()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken: cannot be written"):
        write_atomically(tmp_path / "taken", b"new")  # a folder is in the way of the rename
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "a", b"new")
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "taken"]
