"""Time from `deepspeed` to the first step of a source stage: a tiny T5, two CPU ranks, ZeRO-3; and where it goes.

Each repeat starts two jobs that do the same, one behind the other:
- `deepspeed --num_gpus 2 --module bmtpt_ds source ...` as it is, for the seconds until rank 0 has written the line of
  the first step into metrics.jsonl;
- the same command in ranks that note the time, this file under the launcher, for where the seconds go. Both ranks do
  everything at once; the table is rank 0's.

Launcher: from its process to the one that it starts on each node to that of rank 0. Imports are in the order in which
they come; what a library imports of the others counts as its own.

    python -m tests.benchmarks.startup [--repeats 5] [--out FILE]     ends with one JSON line
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import psutil

from tests.benchmarks.json_line import write_line

MARKS = "BMTPT_STARTUP_MARKS"  # the file into which rank 0 writes when what was done
IMPORTS = {
    "import torch": "torch",
    "import deepspeed": "deepspeed",
    "import transformers' T5": "transformers.models.t5.modeling_t5",
    "import bmtpt_ds": "bmtpt_ds.commands.pipeline",
}
COMMANDS = {
    "python -c 'import bmtpt_ds'": ["-c", "import bmtpt_ds"],
    "bmtpt --help": ["-m", "bmtpt_ds", "--help"],
    "bmtpt tasks": ["-m", "bmtpt_ds", "tasks"],
    "bmtpt check": ["-m", "bmtpt_ds", "check", "--deepspeed_config", "zero3_cpu", "--config"],  # the recipe follows
}


def rank(arguments: list[str]) -> None:
    """A rank of the job."""
    from bmtpt_ds.cli import main  # no heavy library yet
    from bmtpt_ds.imports import quick_imports

    own = psutil.Process()
    node = own.parent()
    at = {"start": node.parent().create_time(), "launcher": node.create_time(), "launcher, node": own.create_time()}
    at["start of Python"] = time.time()
    with quick_imports():
        for what, module in IMPORTS.items():
            import_module(module)
            at[what] = time.time()

    def note(module: str, name: str, *, before: str | None = None, after: str | None = None) -> None:
        _wrap(import_module(module), name, at, before, after)

    note("deepspeed.comm.torch", "build_shm_op", before="recipe", after="shared-memory op")
    note("bmtpt_ds.commands.pipeline", "start", after="rendezvous")
    note("bmtpt_ds.session", "load_backbone", before="rows", after="model")
    note("bmtpt_ds.methods.bmtpt", "learn_posterior", before="tokenizer, prompts, files")
    note("bmtpt_ds.source", "svgd_step", after="first step")
    try:
        main(arguments)
    finally:
        if os.environ["RANK"] == "0" and "first step" in at:
            Path(os.environ[MARKS]).write_text(json.dumps(at))


def _wrap(module: ModuleType, name: str, at: dict[str, float], before: str | None, after: str | None) -> None:
    """Has a function of a module note the time at which it is called, and at which it has returned, the first time."""
    inner: Callable = getattr(module, name)

    def call(*arguments: object, **options: object) -> object:
        if before:
            at.setdefault(before, time.time())
        value = inner(*arguments, **options)
        if after:
            at.setdefault(after, time.time())
        return value

    setattr(module, name, call)


def measure(repeats: int) -> dict:
    """Medians over the repeats, in seconds."""
    from tests import launch, toy

    totals, parts = [], []
    commands: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, data = toy.make_model(folder / "model", own_head=True), toy.make_rows(folder / "rows")
        recipe = folder / "recipe.yaml"
        recipe.write_text(toy.recipe_text(model, data))
        launch.compile_once()
        for repeat in range(repeats):
            source = ["source", "--config", recipe, "--deepspeed_config", "zero3_cpu", "--set", "run.log_every=1"]
            totals.append(_until_first_line([*source, "--run-dir", folder / f"run{repeat}"], folder))
            parts.append(_parts([*source, "--run-dir", folder / f"marked{repeat}"], folder))
            for name, arguments in COMMANDS.items():
                command = [sys.executable, *arguments, *([str(recipe)] if name == "bmtpt check" else [])]
                begun = time.perf_counter()
                launch.run(command, folder / "log")
                commands[name].append(time.perf_counter() - begun)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "repeats": repeats,
        "first_step": {"median": statistics.median(totals), "least": min(totals), "most": max(totals)},
        "parts": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "commands": {name: statistics.median(found) for name, found in commands.items()},
    }


def _until_first_line(arguments: list, folder: Path) -> float:
    from tests import launch

    metrics = Path(arguments[-1]) / "metrics.jsonl"
    command = launch.deepspeed(2, "--module", "bmtpt_ds", *arguments)
    begun = time.perf_counter()
    with launch.started(command, folder / "log") as job:
        job.until(lambda: metrics.is_file() and metrics.stat().st_size > 0, "first step")
        spent = time.perf_counter() - begun
        job.wait()
    return spent


def _parts(arguments: list, folder: Path) -> dict[str, float]:
    """Seconds of each part, in order."""
    from tests import launch

    marks = folder / "marks.json"
    launch.run(launch.deepspeed(2, __file__, *arguments), folder / "log", variables={MARKS: str(marks)})
    at = sorted(json.loads(marks.read_text()).items(), key=lambda mark: mark[1])
    return {name: then - before for (_, before), (name, then) in pairwise(at)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    found = {"date": str(date.today()), "versions": versions} | measure(options.repeats)
    print(f"{'seconds, medians':32}{'':>8}")
    for name, spent in found["parts"].items():
        print(f"{name:32}{spent:8.2f}")
    print(f"{'sum of these':32}{sum(found['parts'].values()):8.2f}")
    print(f"{'deepspeed to first step':32}{found['first_step']['median']:8.2f}")
    for name, spent in found["commands"].items():
        print(f"{name:32}{spent:8.2f}")
    write_line(found, options.out)


if __name__ == "__main__":
    if MARKS in os.environ:
        rank([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    else:
        main()
