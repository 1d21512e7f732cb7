"""A run's directory: who may write in it, and what lies there."""

import fcntl
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from bmtpt_ds.checkpoint import Checkpoints, Stored
from bmtpt_ds.config import Recipe
from bmtpt_ds.config.yaml_text import parse_yaml, yaml_of
from bmtpt_ds.errors import UserError, written
from bmtpt_ds.files import TEMPORARY, check_writable, write_atomically
from bmtpt_ds.quiet import print_line
from bmtpt_ds.run_files import CONFIG, METRICS, PARTICLES, PARTS, PROMPT, RESULTS, RUNS, ZERO_SHOT, differing_keys

# all that a run writes: what --overwrite may remove; what says that it is a run goes last, for one killed meanwhile
_OWN = (
    RESULTS,
    ZERO_SHOT,
    METRICS,
    PARTICLES,
    PROMPT,
    RUNS,
    *PARTS,
    "checkpoints",
    "tensorboard",
    "csv_monitor",
    "wandb",
    CONFIG,
    ".lock",
)


class RunDirectory:
    """The directory of one run of one stage. Rank 0 alone makes and fills it, after every check has passed."""

    def __init__(self, path: Path, recipe: Recipe, about: dict[str, str], *, resume: bool, overwrite: bool):
        """
        Args:
            about: what the run is beside its recipe: `stage`, `source` or `adapt`, and for the latter `particles`.
            resume: go on with what is there, start if nothing is.
            overwrite: remove the run that is there.
        """
        self.path, self.recipe, self._about = path, recipe, about
        self._resume, self._overwrite = resume, overwrite
        self._lock: IO | None = None
        self._opened = False

    @property
    def stage(self) -> str:
        return self._about["stage"]

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", self.recipe.run.keep)

    @property
    def finished(self) -> bool:
        """Whether the run that is to be resumed has nothing left to do: the results are written last."""
        return self._resume and (self.path / RESULTS).is_file()

    def results(self) -> dict:
        """What a finished run's results.json says."""
        return json.loads((self.path / RESULTS).read_text())

    def checkpoint_to_resume(self) -> Stored | None:
        """The newest sound checkpoint if the run is to be resumed; says which damaged ones it passed over."""
        if not self._resume:
            return None
        stored, refused = self.checkpoints.load_latest()
        for line in refused:
            print_line(f"{line}; the checkpoint before it is used")
        return stored

    def of_run(self, name: str, recipe: Recipe) -> "RunDirectory":
        """The directory of one of several runs side by side; this one, if its run is alone."""
        if not name:
            return self
        return RunDirectory(self.path / RUNS / name, recipe, self._about, resume=self._resume, overwrite=False)

    def part(self, name: str) -> "RunDirectory":
        """The folder in this one of what comes before the run itself, one of PARTS: its log and its checkpoints."""
        return _Part(self.path / name, self.recipe, {"stage": name}, resume=self._resume, overwrite=False)

    def check(self) -> None:
        """Refuses, without touching anything, a directory that this run may not write in.

        Raises:
            UserError: another run, other files, no permission, a recipe that differs from the run to be resumed.
        """
        if self._resume and self._overwrite:
            raise UserError("--resume and --overwrite exclude each other: give one of them")
        check_writable(self.path, "--run-dir")
        leftovers = {".lock", *(p.name for p in self.path.glob(TEMPORARY))}
        if not self.path.is_dir() or {p.name for p in self.path.iterdir()} <= leftovers:
            return
        if not (self.path / CONFIG).is_file():
            raise UserError(f"--run-dir {self.path}: holds files that are no run of bmtpt; give another folder")
        if self._resume:
            self._check_same_recipe()
        elif not self._overwrite:
            raise UserError(f"--run-dir {self.path}: holds a run; add --resume or --overwrite, or give another folder")

    def _check_same_recipe(self) -> None:
        if keys := differing_keys(self.path, parse_yaml(self._config_text(), "recipe")):
            raise UserError(
                f"--resume: {', '.join(keys)} differs from the run in {self.path}; "
                "take its values, or start anew with --overwrite or another --run-dir"
            )

    def _config_text(self) -> str:
        return config_text(self._about, self.recipe)

    def open(self) -> None:
        """Makes the directory, takes its lock, removes what --overwrite gives up, writes the resolved recipe. Once."""
        if self._opened:
            return
        self._opened = True
        is_new = not self.path.exists()
        with written(f"--run-dir {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self._overwrite:
                for name in _OWN:
                    entry = self.path / name
                    shutil.rmtree(entry) if entry.is_dir() else name == ".lock" or entry.unlink(missing_ok=True)
        try:
            write_atomically(self.path / CONFIG, self._config_text().encode())
        except UserError:
            if is_new:
                with suppress(OSError):  # not empty: another process has begun there too
                    (self.path / ".lock").unlink()
                    self.path.rmdir()
            raise

    def _take_lock(self) -> None:
        self._lock = take_lock(self.path, "--run-dir")  # held until the process ends
        if self._lock is None:
            return
        for folder in (self.path, self.checkpoints.folder):
            for leftover in folder.glob(TEMPORARY):  # of a run that was killed
                leftover.unlink(missing_ok=True)


class _Part(RunDirectory):
    def open(self) -> None:
        with written(f"--run-dir {self.path}"):
            self.path.mkdir(exist_ok=True)


def config_text(about: dict[str, str], recipe: Recipe) -> str:
    """What stands in a run's config.yaml; `about` as in `RunDirectory`."""
    return yaml_of(about) + recipe.to_yaml()


def take_lock(folder: Path, what: str) -> IO | None:
    """Keeps other processes of ours out of a folder until the returned file is closed; `what` is where it was said.

    Returns:
        None on a file system without locks.

    Raises:
        UserError: another process is in it.
    """
    lock = open(folder / ".lock", "w")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{what} {folder}: another process is running in it; wait for it or end it") from None
    except OSError:
        return None
    return lock
