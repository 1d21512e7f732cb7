"""What a run says while it runs: metrics.jsonl, a progress bar, DeepSpeed's monitor."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from tqdm import tqdm

from bmtpt_ds.checkpoint import GO_ON
from bmtpt_ds.config import NOT_TASKS
from bmtpt_ds.errors import written
from bmtpt_ds.files import write_atomically
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.parallel.measure import peak_memory
from bmtpt_ds.phases import Phases
from bmtpt_ds.progress import on_terminal, open_bar, show_behind
from bmtpt_ds.readable import duration
from bmtpt_ds.run_files import METRICS


def is_log_step(step: int, log_every: int, steps: int) -> bool:
    """Whether a step gets a line: the first, every `log_every`-th, the last."""
    return step == 1 or step % log_every == 0 or step == steps


class _MetricsFile:
    """A run's metrics.jsonl."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS

    def keep_until(self, start: int, validated: int) -> None:
        """Drops the lines of later steps and validations."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # torn by the kill
            if values["step"] <= (validated if "validation" in values else start):
                kept.append(line)
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode(), GO_ON)

    def add(self, values: Mapping[str, Any]) -> None:
        with written(self.path, GO_ON), open(self.path, "a") as file:
            file.write(json.dumps(_finite(values), allow_nan=False) + "\n")


class RunLog:
    """The log of one run, or of several that are trained side by side.

    Rank 0 writes and speaks; where it cannot write, all ranks learn of it.
    """

    def __init__(
        self,
        folder: Path,
        ds: Mapping[str, Any],
        *,
        ranks: Ranks,
        start: int,
        validated: int,
        steps: int,
        title: str,
        runs: Mapping[str, Path] | None = None,
    ):
        """
        Args:
            folder: the run's directory; `metrics.jsonl` lies there.
            ds: the DeepSpeed JSON, whose monitor sections are honoured; TensorBoard is on unless it says otherwise.
            start: the step that the run goes on from; lines of later steps are from before it was killed and go.
            validated: likewise for the lines of validations.
            steps: of the whole run.
            title: the stage, in front of every line for a person.
            runs: the directories of runs side by side, by name; each gets a metrics.jsonl of its own.

        Raises:
            UserError: the disk is full, and its like.
        """
        self.phases = Phases(ranks.device)
        self._ranks, self._first, self._steps = ranks, ranks.first, steps
        self._file, self._title = _MetricsFile(folder), title
        self._files = {name: _MetricsFile(path) for name, path in (runs or {}).items()}
        self._bar = open_bar(title, steps, done=start, shown=self._first)
        self._monitor: MonitorMaster | None = None
        ranks.first_does(lambda: self._open(ds, start, validated))

    def _open(self, ds: Mapping[str, Any], start: int, validated: int) -> None:
        for file in (self._file, *self._files.values()):
            file.keep_until(start, validated)
        with written(f"what the monitors log of {self._file.path.parent}", GO_ON):
            self._monitor = MonitorMaster(get_monitor_config(_monitor_sections(ds, self._file.path.parent)))

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._first:
            self._bar.update(step - self._bar.n)

    def line(self, values: Mapping[str, Any]) -> None:
        """One line of metrics: to the file, to the monitor, and in short to a person.

        All ranks must come here together.

        Args:
            values: rank 0's count: `step`; numbers, lists of numbers and nested mappings of them.

        Raises:
            UserError: the disk is full, and its like; on all ranks.
        """
        self._ranks.first_does(lambda: self._line(values))

    def line_of_runs(
        self,
        together: Mapping[str, Any],
        of_runs: Mapping[str, Mapping[str, Any]],
        of_job: Mapping[str, Any] | None = None,
    ) -> None:
        """As `line`: one of all runs `together`, and one of each run by its name. A run that is alone has one line.

        Args:
            of_job: what the runs have in common, such as the time of a step.
        """

        def lines() -> None:
            for name, file in self._files.items():
                file.add(of_runs[name])
            (alone,) = [together] if self._files or len(of_runs) > 1 else of_runs.values()
            self._line({**alone, **(of_job or {})})

        self._ranks.first_does(lines)

    def _line(self, values: Mapping[str, Any]) -> None:
        values = _finite(values)
        if "validation" not in values:
            values["peak_memory"] = peak_memory(self._ranks.device)
        self._file.add(values)
        step = values["step"]
        events = [(f"{self._title}/{k}", v, step) for k, v in _flatten(values) if k != "step"]
        with written(f"what the monitors log of {self._file.path.parent}", GO_ON):
            self._monitor.write_events(events)
        if "validation" in values:
            self.say(f"{self._title} {step}/{self._steps}  {_validation(values['validation'], values['majority'])}")
            return
        if on_terminal():
            show_behind(self._bar, list(_figures(values, self._steps - step, brief=True)))
        else:
            figures = _figures(values, self._steps - step, brief=False)
            self.say("  ".join([f"{self._title} {step}/{self._steps}", *figures]))

    def say(self, text: str) -> None:
        """A sentence to the person who watches."""
        if self._first:
            with suppress(OSError):  # who watched has gone: the run goes on
                tqdm.write(text, file=sys.stderr)  # above the bar where there is one

    def close(self) -> None:
        """Ends the bar, and TensorBoard's file and thread: DeepSpeed's monitors have no word for that."""
        if not self._first:
            return
        self._bar.close()
        board = self._monitor.tb_monitor
        if board is not None and board.summary_writer is not None:
            with suppress(OSError):  # every line has been flushed: nothing is left to be lost
                board.summary_writer.close()


def _monitor_sections(ds: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    sections = {name: dict(ds[name]) for name in ("csv_monitor", "wandb") if name in ds}
    board = {"enabled": True, **ds.get("tensorboard", {})}
    if not board.get("output_path"):
        board |= {"output_path": str(folder), "job_name": "tensorboard"}
    sections["tensorboard"] = board
    if "csv_monitor" in sections and not sections["csv_monitor"].get("output_path"):
        sections["csv_monitor"] |= {"output_path": str(folder), "job_name": "csv_monitor"}
    return sections


def _finite(value: Any) -> Any:
    """JSON has no nan and no inf: they become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{key}/{i}", v) for i, v in enumerate(value) if isinstance(v, int | float))
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


# name in the metrics: name for a person, and where there is little room
_NAMES = {
    "kernel_mean": ("kernel", "kernel"),
    "drive_norm": ("drive", "drive"),
    "repulsion_norm": ("repulsion", "rep"),
    "prior": ("prior", "prior"),
}


def _figures(values: Mapping[str, Any], steps_left: int, *, brief: bool) -> Iterator[str]:
    """What a line says to a person, most important first."""
    digits = 2 if brief else 3
    if values.get("seconds") is not None:
        yield f"{duration(values['seconds'] * steps_left)} left" if steps_left else "done"
    if values.get("loss") is not None:
        several = values.get("losses") or values.get("run_losses", {}).values()
        losses = [loss for loss in several if loss is not None]
        between = f" ({min(losses):.3g} to {max(losses):.3g})" if len(losses) > 1 and not brief else ""
        yield f"loss {values['loss']:.{digits + 1}g}{between}"
    for name, names in _NAMES.items():
        if values.get(name):  # a prior of 0: there is none
            yield f"{names[brief]} {values[name]:.{digits}g}"
    if values.get("seconds") is not None:
        yield f"{values['seconds']:.{digits}g} s/step"
    if values.get("skipped"):
        yield f"skipped {values['skipped']:.0f}"


def _validation(scores: Mapping[str, float], majority: Mapping[str, float]) -> str:
    tasks = {name: value for name, value in scores.items() if name not in NOT_TASKS}
    shown = tasks | {"mean": scores["mean"]} if len(tasks) > 1 else tasks
    best = f"best {scores['best']:.1f} at step {scores['best_step']}, " if "best" in scores else ""
    figures = "  ".join(f"{name} {value:.1f}" for name, value in shown.items() if value is not None)
    return f"validation: {figures}  ({best}majority class {majority['mean']:.1f})"
