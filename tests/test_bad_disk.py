"""Disks that are full and folders that may not be written: said in one line, nothing lost, and mended it goes on.

A full disk is a small tmpfs of the test's own, which only root may mount. Root may also write anywhere: what an
ordinary user meets is tried without that right.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from bmtpt_ds.cli import main
from bmtpt_ds.config import load_recipe
from bmtpt_ds.errors import UserError
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import get_task
from tests import launch
from tests.launch import lines_of
from tests.mistakes import Bench

# a process without the rights by which root writes anywhere
_NOT_ROOTS = "-dac_override,-dac_read_search,-fowner"
ORDINARY = ["setpriv", f"--bounding-set={_NOT_ROOTS}", f"--inh-caps={_NOT_ROOTS}"] if os.geteuid() == 0 else []


class Disk:
    """A disk of a few KiB."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def mount(self, kib: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", self.folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
        return self.folder

    def make_room(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=8m", self.folder], check=True)


@pytest.fixture
def disk(tmp_path_factory) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    disk = Disk(tmp_path_factory.mktemp("disk") / "mounted")
    yield disk
    if disk.folder.is_mount():
        subprocess.run(["umount", "--lazy", disk.folder], check=True)


def said(capsys, command: str) -> str:
    """The one line of the mistake, the last on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line]
    assert [line for line in lines if line.startswith(f"bmtpt {command}: ")] == lines[-1:]
    assert "No space left on device; make room on that disk" in lines[-1]
    return lines[-1]


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("kib", "what"),
    [(8, "metrics.jsonl"), (12, "step-00000002"), (24, "step-00000004"), (40, "step-00000006")],
)
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(kib: int, what: str, disk: Disk, bench: Bench, capsys) -> None:
    bench.run_dir = disk.mount(kib) / "run"
    assert main(bench.source()) == 2
    line = said(capsys, "source")
    assert what in line and line.endswith("make room on that disk, then go on with --resume")
    assert not temporaries(disk.folder)
    disk.make_room()
    assert main(bench.source("--resume")) == 0
    ours, theirs = (load_file(run / "particles.safetensors") for run in (bench.run_dir, bench.runs.source))
    assert equal(ours["particles"], theirs["particles"])
    assert (bench.run_dir / "metrics.jsonl").read_text().count("\n") == 4  # steps 1, 2, 4 and 6, each once


def test_monitors_on_a_full_disk(disk: Disk, bench: Bench, tmp_path_factory) -> None:
    """TensorBoard writes in a thread of its own, which a process of its own shows as it is."""
    bench.run_dir = disk.mount(4) / "run"
    command = launch.forked(0, "-m", "bmtpt_ds", *bench.source())
    output = launch.run(command, tmp_path_factory.mktemp("job") / "log", status=2)
    assert output.splitlines()[-1].startswith(f"bmtpt source: what the monitors log of {bench.run_dir}: cannot be")
    assert "Traceback" not in output
    disk.make_room()
    assert main(bench.source("--resume")) == 0


def test_a_disk_without_room_for_the_recipe_keeps_no_run(disk: Disk, bench: Bench, capsys) -> None:
    folder = disk.mount(4)
    (folder / "full").write_bytes(bytes(4096))
    bench.run_dir = folder / "run"
    assert main(bench.source()) == 2
    assert "config.yaml" in said(capsys, "source")
    assert [path.name for path in folder.iterdir()] == ["full"]


def test_an_adaptation_on_a_full_disk(disk: Disk, bench: Bench, capsys) -> None:
    bench.run_dir = disk.mount(20) / "run"
    assert main(bench.adapt()) == 2
    assert "checkpoints/step-" in said(capsys, "adapt")
    disk.make_room()
    assert main(bench.adapt("--resume")) == 0
    ours, theirs = (load_file(run / "prompt.safetensors") for run in (bench.run_dir, bench.runs.adapt))
    assert all(equal(ours[name], theirs[name]) for name in theirs)


def test_prepared_rows_on_a_full_disk(disk: Disk, bench: Bench, capsys) -> None:
    bench.out = disk.mount(12) / "prepared"
    assert main(bench.prepare()) == 2
    assert f"--out {bench.out}" in said(capsys, "prepare")
    assert not list(disk.folder.iterdir())
    disk.make_room()
    assert main(bench.prepare()) == 0


def test_scores_are_shown_where_they_cannot_be_written(disk: Disk, bench: Bench, capsys) -> None:
    folder = disk.mount(4)
    files = ["--json", str(folder / "scores.json"), "--predictions", str(folder / "predictions.jsonl")]
    assert main(bench.evaluate(*files)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"bmtpt evaluate: {folder}/predictions.jsonl: cannot be written: No space left")
    assert lines[-2].startswith("mrpc ") and "accuracy" in lines[-2]
    assert [path.name for path in folder.iterdir()] == ["scores.json"]


@pytest.mark.parametrize("kib", [4, 100])
def test_the_demos_model_on_a_full_disk(kib: int, disk: Disk) -> None:
    from bmtpt_ds.experiments.toy_model import toy_model

    folder = disk.mount(kib) / "model"
    own = load_recipe("demo").data.tasks
    tasks = [get_task(name, own) for name in own]
    with pytest.raises(UserError, match=rf"^{folder}: cannot be written: "):
        toy_model(folder, tasks, StopSignal(), steps=1)
    disk.make_room()
    toy_model(folder, tasks, StopSignal(), steps=1)
    assert {"config.json", "model.safetensors", "spiece.model"} <= {path.name for path in folder.iterdir()}


def test_of_several_ranks_the_one_that_writes_speaks(disk: Disk, bench: Bench, tmp_path_factory) -> None:
    bench.run_dir = disk.mount(12) / "run"
    command = launch.forked(2, "-m", "bmtpt_ds", *bench.source("--deepspeed_config", "zero3_cpu"))
    output = launch.run(command, tmp_path_factory.mktemp("job") / "log", status=2)
    lines = [line for line in output.splitlines() if line.startswith("bmtpt source: ")]
    assert len(lines) == 1 and "checkpoints/step-00000002.safetensors: cannot be written" in lines[0]
    assert "Traceback" not in output


# --- an ordinary user ------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(tmp_path_factory) -> Path:
    if ORDINARY and not shutil.which("setpriv"):
        pytest.skip("root may write anywhere, and setpriv is missing")
    folder = tmp_path_factory.mktemp("locked")
    folder.chmod(0o500)
    return folder


def without_writing(folder: Path, change: Callable[[int], int]) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(change(path.stat().st_mode))


def test_folders_that_may_not_be_written(bench: Bench, locked: Path, tmp_path_factory) -> None:
    """Each is refused before any work; what is only read may be someone else's."""
    theirs = bench.folder / "theirs"
    shutil.copytree(bench.runs.adapt, theirs)
    without_writing(theirs, lambda mode: mode & ~0o222)
    bench.run_dir, bench.out = locked / "run", locked / "out"
    commands = {
        f"--run-dir {locked}/run": bench.source(),
        f"--out {locked}/out": bench.prepare(),
        f"--out {locked}/demo": ["demo", "--out", str(locked / "demo")],
        f"--json {locked}/scores.json": bench.evaluate("--json", str(locked / "scores.json")),
        f"--predictions {locked}/p.jsonl": bench.evaluate("--predictions", str(locked / "p.jsonl")),
        "": bench.evaluate("--json", str(bench.folder / "scores.json"), prompt=theirs),
    }
    folder = tmp_path_factory.mktemp("commands") / "job"
    seen = dict(zip(commands, launch.run_commands(list(commands.values()), folder, before=ORDINARY), strict=True))
    without_writing(theirs, lambda mode: mode | 0o200)
    assert seen.pop("")["status"] == 0
    for what, outcome in seen.items():
        assert outcome["status"] == 2
        (line,) = lines_of(outcome["stderr"])
        assert f": {what}: " in line and "cannot be written; give a folder of yours" in line
    assert not list(locked.iterdir())


def test_paths_that_may_not_even_be_looked_at(bench: Bench, tmp_path_factory) -> None:
    """A colleague's home; and names that no file system takes."""
    if ORDINARY and not shutil.which("setpriv"):
        pytest.skip("root may look anywhere, and setpriv is missing")
    home = tmp_path_factory.mktemp("home")
    beyond, longer = home / "theirs", "x" * 300
    home.chmod(0)
    commands = [
        command
        for path in (beyond, longer)
        for command in (
            ["check", "--config", f"{path}.yaml"],
            bench.check("--set", f"model.name_or_path={path}/"),
            bench.check("--set", f"data.root={path}"),
            bench.check("--deepspeed_config", f"{path}.json"),
            bench.source("--set", f"data.root={path}"),
            bench.adapt(particles=path),
            bench.evaluate(prompt=path),
            ["export", "--prompt", str(path), "--out", str(bench.folder / "out")],
            ["import", "--peft", str(path), "--out", str(bench.folder / "out")],
            ["report", str(path), "--out", str(bench.folder / "out")],
        )
    ]
    seen = launch.run_commands(commands, tmp_path_factory.mktemp("commands") / "job", before=ORDINARY)
    home.chmod(0o700)
    for command, outcome in zip(commands, seen, strict=True):
        assert outcome["status"] == 2, (command, outcome)
        (line,) = lines_of(outcome["stderr"])
        assert str(beyond) in line or longer in line
    assert not (bench.folder / "out").exists()
    assert not bench.run_dir.exists()


def test_what_one_rank_cannot_look_at_is_a_mistake_on_all(loaded, tmp_path: Path) -> None:
    def look() -> None:
        os.stat(tmp_path / ("x" * 300))

    with pytest.raises(UserError, match="x: File name too long; give a shorter one"):
        loaded.ranks.together(look)
    with pytest.raises(FileNotFoundError):  # a fault of ours
        loaded.ranks.together(lambda: os.stat(tmp_path / "gone"))


def test_a_home_folder_that_may_not_be_written(bench: Bench, locked: Path) -> None:
    environment = launch.environment() | {"TORCH_EXTENSIONS_DIR": str(locked / "extensions")}
    command = [*ORDINARY, *launch.plain(*bench.source())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=launch.LIMIT)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bmtpt source: ")]
    assert f"{locked}/extensions" in line and "set TORCH_EXTENSIONS_DIR to a folder of yours" in line
    assert "Traceback" not in done.stderr + done.stdout
    assert not bench.run_dir.exists()
