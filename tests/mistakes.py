"""What the tests of a user's mistakes share: a run that would work, to break it, and what must come of that."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from bmtpt_ds.cli import main
from tests.launch import lines_of


class Runs(NamedTuple):
    """Finished runs on the tiny model that has a head of its own; nothing may write into them."""

    source: Path
    adapt: Path


def make_runs(folder: Path, recipe: str) -> Runs:
    (folder / "recipe.yaml").write_text(recipe)
    named = ["--config", str(folder / "recipe.yaml"), "--run-dir"]
    made = Runs(folder / "source", folder / "adapt")
    assert main(["source", *named, str(made.source)]) == 0
    assert main(["adapt", *named, str(made.adapt), "--particles", str(made.source)]) == 0
    return made


class Bench:
    """Command lines that would work, and copies of what they use to break, in a folder of its own."""

    def __init__(self, folder: Path, recipe: Path, untied: Path, tied: Path, rows: Path, runs: Runs):
        self.folder, self.recipe, self.untied, self.tied = folder, recipe, untied, tied
        self.rows, self.runs = rows, runs
        self.run_dir = folder / "run"
        self.out = folder / "prepared"
        self.input = b"a good film\n"
        self.lock: IO | None = None

    def source(self, *arguments: str) -> list[str]:
        return ["source", "--config", str(self.recipe), "--run-dir", str(self.run_dir), *arguments]

    def adapt(self, *arguments: str, particles: Path | str | None = None) -> list[str]:
        command = ["adapt", "--config", str(self.recipe), "--run-dir", str(self.run_dir)]
        return [*command, "--particles", str(particles or self.runs.source), *arguments]

    def evaluate(self, *arguments: str, prompt: Path | None = None) -> list[str]:
        return ["evaluate", "--prompt", str(prompt or self.runs.adapt), *arguments]

    def predict(self, *arguments: str, prompt: Path | None = None) -> list[str]:
        """With `input` on stdin."""
        return ["predict", "--prompt", str(prompt or self.runs.adapt), *arguments]

    def check(self, *arguments: str) -> list[str]:
        return ["check", "--config", str(self.recipe), *arguments]

    def prepare(self, *arguments: str) -> list[str]:
        return ["prepare", "--config", str(self.recipe), "--out", str(self.out), *arguments]

    def prepared(self) -> tuple[Path, list[str]]:
        """A prepared folder, and the arguments that name it."""
        with given(b""):
            assert main(self.prepare()) == 0
        return self.out, ["--set", f"data.root={self.out}"]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self) -> tuple[Path, list[str]]:
        """A copy of the model, and the arguments that name it."""
        copy = self.folder / "model"
        shutil.copytree(self.untied, copy)
        return copy, ["--set", f"model.name_or_path={copy}"]

    def data(self) -> tuple[Path, list[str]]:
        """A copy of the rows, and the arguments that name it."""
        copy = self.folder / "rows"
        shutil.copytree(self.rows, copy)
        return copy, ["--set", f"data.root={copy}"]

    def json(self, content: object) -> list[str]:
        """The arguments that name a DeepSpeed JSON of that content."""
        text = content if isinstance(content, str) else json.dumps(content)
        return ["--deepspeed_config", str(self.file("ds.json", text))]

    def interrupted(self, run: Path) -> Path:
        """A copy of a run, at `run_dir`, that has not come to its end: checkpoints and no results."""
        shutil.copytree(run, self.run_dir)
        for name in ("results.json", "particles.safetensors", "prompt.safetensors"):
            (self.run_dir / name).unlink(missing_ok=True)
        return self.run_dir


Case = Callable[[Bench], tuple[list[str], list[str]]]  # -> command line, what its line on stderr must hold


class Cases(dict[str, Case]):
    """Cases by name."""

    def __call__(self, function: Case) -> Case:
        """Decorator: a case of the function's name."""
        self[function.__name__] = function
        return function

    def setting(self, name: str, text: str, *expected: str, stage: str = "source") -> None:
        """A case that is one `--set`."""
        self[name] = lambda bench: (getattr(bench, stage)("--set", text), list(expected))

    def section(self, name: str, content: object, *expected: str) -> None:
        """A case that is one DeepSpeed JSON."""
        self[name] = lambda bench: (bench.source(*bench.json(content)), ["ds.json", *expected])


@contextmanager
def given(data: bytes) -> Iterator[None]:
    """Inside, `data` is what stdin holds; in no encoding, as under another locale."""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data), encoding="ascii")
    try:
        yield
    finally:
        sys.stdin = before


def snapshot(*folders: Path) -> dict[Path, bytes | None]:
    """Every file, folder and link below, with the files' bytes."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def assert_refused(case: Case, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    """Exit status 2, one line on stderr and nothing else there, nothing left behind, nothing changed."""
    arguments, expected = case(bench)
    folders = (bench.folder, bench.runs.source.parent)
    before = snapshot(*folders)
    capsys.readouterr()
    with given(bench.input):
        status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 2
    assert len(lines_of(err)) == 1, err
    assert lines_of(err)[0].startswith(f"bmtpt {arguments[0]}: ")
    missing = [text for text in expected if text not in err]
    assert not missing, err
    assert "Traceback" not in out
    assert snapshot(*folders) == before
