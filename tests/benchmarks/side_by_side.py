"""Time of several adaptations: one after another in one process, and side by side in one job (`target.seeds`).

Random weights, random rows of two toy tasks, 16 labelled rows, as many runs as seeds times tasks. Both ways load the
model, train, validate and test; the runs' losses are compared. They take turns; medians and the ratio are of the same
process. Of a run one after another nothing is left out but the start of the process, some 8 s on a CPU.

    python -m tests.benchmarks.side_by_side [--model t5-small] [--seeds 5] [--repeats 3] [--out FILE]

Ends with one JSON line.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from bmtpt_ds.cli import main as bmtpt
from tests import toy
from tests.benchmarks.json_line import write_line
from tests.benchmarks.source_step import SHAPES

TASKS, STEPS = ("mrpc", "cola"), 20


def settings(model: Path, rows: Path, dtype: str) -> str:
    return f"""
model: {{name_or_path: {model}, dtype: {dtype}, max_source_length: 64}}
prompt: {{length: 20}}
target: {{shots: 16, steps: {STEPS}, batch_size: 16, warmup_steps: 2, eval_every: 10}}
evaluate: {{scoring: labels}}
data: {{root: {rows}}}
run: {{log_every: {STEPS}, save_every: 1000}}
"""


def adapt(recipe: Path, run_dir: Path, **target: object) -> None:
    values = [argument for key, value in target.items() for argument in ("--set", f"{key.replace('__', '.')}={value}")]
    command = ["adapt", "--config", str(recipe), "--particles", "none", "--run-dir", str(run_dir), *values]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert bmtpt(command) == 0, said.getvalue()


def one_after_another(recipe: Path, folder: Path, seeds: int) -> Iterator[Path]:
    for task in TASKS:
        for seed in range(seeds):
            adapt(recipe, folder / f"{task}-{seed}", target__tasks=f"[{task}]", run__seed=seed)
            yield folder / f"{task}-{seed}"


def side_by_side(recipe: Path, folder: Path, seeds: int) -> Iterator[Path]:
    adapt(recipe, folder, target__tasks=f"[{', '.join(TASKS)}]", target__seeds=list(range(seeds)))
    yield from (folder / "runs" / f"{task}-{seed}" for task in TASKS for seed in range(seeds))


def first_losses(runs: list[Path]) -> list[float]:
    return [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in runs]


def measure(shape: str, seeds: int, repeats: int) -> dict:
    times: dict[str, list[float]] = {"one after another": [], "side by side": []}
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy.write_model(
            folder / "model", own_head=False, dtype=getattr(torch, dtype), vocab_size=32128, **SHAPES[shape]
        )
        toy.make_rows(folder / "rows")
        recipe = folder / "recipe.yaml"
        recipe.write_text(settings(folder / "model", folder / "rows", dtype))
        adapt(recipe, folder / "warm", **{"target.tasks": "[mrpc]", "target.steps": 3})
        for repeat in range(repeats):
            losses = []
            for way, run in (("one after another", one_after_another), ("side by side", side_by_side)):
                begun = time.perf_counter()
                runs = list(run(recipe, folder / f"{way} {repeat}", seeds))
                times[way].append(time.perf_counter() - begun)
                losses.append(first_losses(runs))
            apart = [abs(one - other) / one for one, other in zip(*losses, strict=True)]
            assert max(apart) < (1e-2 if dtype == "bfloat16" else 1e-4), "not the same runs"
    return {
        "model": shape,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if dtype == "bfloat16" else f"cpu, {torch.get_num_threads()} threads",
        "runs": len(TASKS) * seeds,
        "seconds": {way: statistics.median(found) for way, found in times.items()},
        "ratio": statistics.median(one / other for one, other in zip(*times.values(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="t5-small")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    found = {"date": str(date.today()), "versions": versions} | measure(options.model, options.seeds, options.repeats)
    for way, seconds in found["seconds"].items():
        print(f"{found['runs']} runs {way:18}{seconds:8.1f} s")
    write_line(found, options.out)


if __name__ == "__main__":
    main()
