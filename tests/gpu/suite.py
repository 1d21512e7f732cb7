"""Everything that wants a GPU, one part after another. launchers/gpu_suite.sh says more.

    python -m tests.gpu.suite --out DIR [part ...]

Writes DIR/gpu-suite-DATE.json (device, versions, date, and for each part its status, seconds and figures) and a log a
part beside it, and ends with a short table. Exit status 1 if a part has failed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 525  # of the whole suite: it ends within nine minutes
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "safetensors")


class Part(NamedTuple):
    command: Sequence[str]  # {out} is a file for its JSON line, {work} an empty folder
    seconds: int
    alone: bool = True  # it measures; what only checks runs beside other checks, before


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


TESTED = ("tests/gpu", *(f"tests/model/test_{name}.py" for name in ("attention", "whole_block", "packed_pass")))
SANITIZER = ("compute-sanitizer", "--error-exitcode", "3", "--kernel-regex", "kns=_kernel", "--tool")
SMALL = python("-m", "tests.gpu.small_case")


def profile(layout: str, *models: str, recomputed: str = "false", graphs: str = "true") -> Part:
    """Both stages with the paper's sizes and rows of its tasks' lengths, on one GPU."""
    launcher = ("deepspeed.launcher.runner", "--num_gpus", "1", "--module") if layout == "zero3" else ()
    kept = (f"model.activation_checkpointing={recomputed}", f"model.cuda_graphs={graphs}")
    overrides = [
        word for setting in ("model.dtype=bfloat16", *kept, "target.tasks=[cb]") for word in ("--set", setting)
    ]
    shapes = ("--random-init", *models, "--deepspeed_config", layout, "--steps", "10")
    return Part(python("-m", *launcher, "bmtpt_ds", "profile", *shapes, *overrides, "--json", "{out}"), 75)


def source(layout: str) -> Part:
    command = ("-m", "tests.gpu.source_run", layout, "{work}", "--out", "{out}")
    return Part(python(*command), 120, alone=False)


def against_peft(model: str, seconds: int = 60) -> Part:
    return Part(python("-m", "tests.benchmarks.source_step", "--model", model, "--out", "{out}"), seconds)


PARTS = {
    "accuracy": Part(python("-m", "tests.gpu.accuracy", "--out", "{out}"), 150, alone=False),
    "tests": Part(
        python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiles", *TESTED), 150, alone=False
    ),
    "source resident": source("resident"),
    "source zero3": source("zero3"),
    "memcheck": Part((*SANITIZER, "memcheck", *SMALL), 100, alone=False),
    "racecheck": Part((*SANITIZER, "racecheck", *SMALL), 100, alone=False),
    "benchmark": Part(python("-m", "tests.benchmarks.svgd_step", "--out", "{out}"), 150),
    "profile resident": profile("resident", "t5-base", "t5-large", "t5-3b"),
    "profile resident without graphs": profile("resident", "t5-3b", graphs="false"),
    "graphs": Part(python("-m", "tests.benchmarks.cuda_graphs", "--out", "{out}"), 60),
    "profile zero3": profile("zero3", "t5-3b"),
    "peft t5-base": against_peft("t5-base"),
    "peft t5-large": against_peft("t5-large"),
    "profile resident recomputed": profile("resident", "t5-3b", recomputed="true"),
    "profile zero3 recomputed": profile("zero3", "t5-3b", recomputed="true"),
    "peft t5-3b": against_peft("t5-3b", 120),
}


def run_part(name: str, part: Part, out: Path, work: Path, seconds: float, beside: int = 1) -> dict:
    """Its status, seconds, and figures where it wrote some. What it prints goes to a log.

    Args:
        beside: so many parts share the processor.
    """
    stem = name.replace(" ", "-")
    figures, log = work / f"{stem}.json", out / f"gpu-suite-{stem}.log"
    places = {"{out}": str(figures), "{work}": str(work)}
    command = [places.get(word, word) for word in part.command]
    if shutil.which(command[0]) is None:
        return {"status": f"skipped: no {command[0]} here", "seconds": 0.0}
    if seconds < 10:
        return {"status": "skipped: no time left", "seconds": 0.0}
    began = time.monotonic()
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // beside)), **os.environ}
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(min(part.seconds, seconds))
            status = "passed" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"failed: not done after {min(part.seconds, seconds):.0f} s"
        finally:
            end_session(process)
    result = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if figures.exists():
        result["figures"] = json.loads(figures.read_text())
    elif name == "tests":
        result["figures"] = log.read_text().strip().splitlines()[-1:]
    return result


def end_session(process: subprocess.Popen) -> None:
    """Ends all that a part has started, by id."""
    import psutil

    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid:
                other.kill()
        except (OSError, psutil.Error):
            continue
    process.wait(30)


def describe() -> dict:
    """Device, versions, date."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    return {
        "suite": "gpu",
        "date": date.today().isoformat(),
        "device": properties.name if gpu else "none",
        "multiprocessors": properties.multi_processor_count if gpu else 0,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def run(names: Sequence[str], parts: Mapping[str, Part], out: Path, seconds: float, about: dict) -> dict:
    """Runs the parts, checks side by side and then what measures, and writes after each what is known by then; returns
    that."""
    end, result = time.monotonic() + seconds, about | {"parts": {}}
    checks = [name for name in names if not parts[name].alone]
    groups = [checks, *([name] for name in names if parts[name].alone)]
    with tempfile.TemporaryDirectory() as work:
        for group in filter(None, groups):
            with ThreadPoolExecutor(len(group)) as pool:
                left = end - time.monotonic()
                running = {
                    pool.submit(run_part, name, parts[name], out, Path(work), left, len(group)): name for name in group
                }
                for done in as_completed(running):
                    result["parts"][running[done]] = done.result()
                    (out / f"gpu-suite-{about['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
                    print(f"{running[done]}: {done.result()['status']}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"default: all; {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="what is not begun by then is left out")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the JSON and the logs")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    about = describe()
    if about["device"] == "none":
        print("gpu_suite: no CUDA device here; start it on a machine with an NVIDIA GPU", file=sys.stderr)
        sys.exit(2)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"gpu_suite: {about['device']}, {about['versions']}", flush=True)
    result = run(options.parts or list(PARTS), PARTS, out, options.seconds, about)
    print(table(result["parts"]))
    print(f"gpu_suite: {out}/gpu-suite-{about['date']}.json")
    sys.exit(any(part["status"].startswith("failed") for part in result["parts"].values()))


def table(parts: dict[str, dict]) -> str:
    """One line a part, with the figure that one looks for."""
    lines = []
    for name, part in parts.items():
        lines.append(f"{name:31} {part['seconds']:6.1f} s  {part['status']:28} {headline(name, part.get('figures'))}")
    return "\n".join(lines)


def headline(name: str, figures: dict | list | None) -> str:
    if not figures:
        return ""
    if name == "accuracy":
        return f"worst relative error {figures['worst']:.1e}"
    if name == "benchmark":
        rows = [row for row in figures["figures"] if (row.get("M"), row.get("D")) == (5, 102_400) and "gpu_us" in row]
        ways = ", ".join(f"{row['way']} {row['gpu_us']:.1f}" for row in rows)
        return f"us a step at M 5, D 102,400: {ways}; floor {rows[0]['floor_us']:.1f}" if rows else ""
    if name.startswith("profile"):
        return "; ".join(map(_profiled, figures["profiles"]))
    if name == "graphs":
        ways = {model: (of["graphs"]["steady_ms"], of["plain"]["steady_ms"]) for model, of in figures["models"].items()}
        return "; ".join(f"{model} {graphs:.1f} ms, without {plain:.1f}" for model, (graphs, plain) in ways.items())
    if name.startswith("peft"):
        return f"PEFT once per particle takes {figures['over_ours']['peft']:.1f} times as long"
    if name.startswith("source"):
        return f"loss {figures['loss']:.3g}; SVGD by {figures['svgd']}"
    return str(figures[0])


def _profiled(figures: dict) -> str:
    source = figures["stages"]["source"]
    return f"{figures['model']} {source['seconds']['step']['median']:.3f} s, {source['share_of_peak']:.0%} of the peak"


if __name__ == "__main__":
    main()
