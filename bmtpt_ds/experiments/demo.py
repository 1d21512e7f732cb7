"""`bmtpt demo`: the whole method in a few minutes on a laptop, without a GPU and without a network.

A toy T5 is pretrained, particles are learned from four source tasks under the `deepspeed` launcher, by BMTPT and as a
single prompt (M = 1), and both are adapted to three unseen tasks with six labelled rows, beside a prompt from scratch.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import mean
from typing import IO, NamedTuple

from tqdm import tqdm

from bmtpt_ds.commands.pipeline import run_adapt
from bmtpt_ds.config import Recipe, load_recipe
from bmtpt_ds.errors import UserError, written
from bmtpt_ds.experiments.demo_plot import plot_demo
from bmtpt_ds.experiments.launching import Place, started
from bmtpt_ds.experiments.toy_model import toy_model
from bmtpt_ds.experiments.toy_world import SHARED_RULE, rows_of
from bmtpt_ds.files import check_writable, write_atomically
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.quiet import is_verbose, say
from bmtpt_ds.readable import mean_and_spread
from bmtpt_ds.run_files import METRICS, RESULTS
from bmtpt_ds.session import versions
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import get_task

TARGETS = ("course", "shop", "team")  # none of them a source task
SEEDS = (0, 1, 2)
RANKS = 2
_PLACES = {"model.name_or_path": "model", "data.root": "tasks"}
ROWS = {"train": 400, "validation": 60, "test": 200}


class Method(NamedTuple):
    """One way to a target prompt."""

    name: str  # of its folder
    title: str
    particles: int  # M of its source stage; 0: none, the prompt starts from scratch


METHODS = (
    Method("bmtpt", "BMTPT, mean of 5 particles", 5),
    Method("single", "single prompt (M = 1)", 1),
    Method("scratch", "prompt from scratch", 0),
)
Scores = dict[str, dict[str, list[float]]]  # method -> target task -> test accuracy of each seed, 0 to 100


def run_demo(out: Path) -> str:
    """Runs the demo into `out`.

    Args:
        out: model/ (kept for the next time), tasks/, source/<method>, target/<method>/runs/<task>-<seed>, demo.json,
            demo.png, demo.log.

    Returns:
        the table of scores and the commands to try next.

    Raises:
        UserError: `out` holds other things or cannot be written, or the launcher failed.
        Stopped: a signal came.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install 'bmtpt_ds[plot]'")
    named, out = out, out.absolute()
    _clear(out)
    begin = time.monotonic()
    # quoted: a path may hold what means something in YAML
    overrides = [f"{key}={json.dumps(str(out / name))}" for key, name in _PLACES.items()]
    recipe = load_recipe("demo", overrides)
    with StopSignal() as stop, written(out / "demo.log"), (out / "demo.log").open("w") as log:
        say("1/4  a toy T5 that follows instructions in its text (half a minute, the first time)")
        tasks = [get_task(name, recipe.data.tasks) for name in recipe.data.tasks]
        toy_model(out / "model", tasks, stop)
        _write_rows(out / "tasks", recipe)
        for number, method in enumerate((m for m in METHODS if m.particles), start=2):
            say(f"{number}/4  source stage on {RANKS} ranks, ZeRO-3: {method.title}")
            _learn(out / "source" / method.name, [*overrides, f"source.particles={method.particles}"], stop, log)
    say(f"4/4  {recipe.target.shots} labelled rows of {', '.join(TARGETS)}: {len(METHODS)} ways, {len(SEEDS)} seeds")
    with written(out / "demo.log"), (out / "demo.log").open("a") as log:
        scores = _adapt_all(out, overrides, log)
    _write_figures(out, recipe, scores, time.monotonic() - begin)
    titles = {method.name: method.title for method in METHODS}
    averaged = {name: with_mean(by_task) for name, by_task in scores.items()}
    with written(out / "demo.png"):
        plot_demo(out / "demo.png", _losses(out), averaged, titles, shots=recipe.target.shots)
    return f"{score_lines(recipe, scores)}\n\n{_closing(named)}"


def _clear(out: Path) -> None:
    """Refuses a folder of other things; removes an earlier demo, its model excepted."""
    check_writable(out, "--out")
    own = {"model", "tasks", "source", "target", "demo.json", "demo.png", "demo.log"}
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if there - own:
        raise UserError(f"--out {out}: holds {min(there - own)}, which is not of the demo; give another folder")
    if there and "demo.log" not in there:  # the first thing that a demo writes; the other names may be anybody's
        raise UserError(f"--out {out}: holds {min(there)}, but no demo.log: not of the demo; give another folder")
    for name in there - {"model"}:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    with written(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)


def _write_rows(root: Path, recipe: Recipe) -> None:
    """The rows of all tasks, labelled by the one rule that they share, as JSON lines."""
    for topic in recipe.data.tasks:
        rows = iter(rows_of(topic, SHARED_RULE, sum(ROWS.values()), Random(f"rows of {topic}")))
        with written(root / topic):
            (root / topic).mkdir(parents=True)
            for split, count in ROWS.items():
                lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
                (root / topic / f"{split}.jsonl").write_text("".join(lines))


def _learn(run_dir: Path, overrides: list[str], stop: StopSignal, log: IO[str]) -> None:
    """One source stage, as people start it; its progress is shown, all it prints goes to the log."""
    arguments = ["source", "--config", "demo", "--deepspeed_config", "zero3_cpu", "--run-dir", str(run_dir)]
    for override in overrides:
        arguments += ["--set", override]
    last = ""
    with started(Place(RANKS), arguments, subprocess.PIPE) as job:
        for line in job.stdout:
            log.write(line)
            last = line.strip() if line.startswith("bmtpt ") else last
            if line.startswith("source") or is_verbose():
                tqdm.write(f"     {line.rstrip()}", file=sys.stderr)
            if stop.received is not None:
                raise stop.stopped()
        if job.wait() and stop.received is None:
            raise UserError(f"the source stage failed ({last or 'no reason given'}); see {log.name}")
    if stop.received is not None:
        raise stop.stopped()


def _adapt_all(out: Path, overrides: list[str], log: IO[str]) -> Scores:
    """Every method on every target with every seed, side by side in this process; what is printed goes to the log."""
    scores: Scores = {}
    Ranks(load_recipe("demo").run.timeout)  # DeepSpeed silences a compiler on the stderr that is there when it begins
    own = [f"target.tasks=[{', '.join(TARGETS)}]", f"target.seeds={list(SEEDS)}"]
    recipe = load_recipe("demo", [*overrides, *own])
    for method in tqdm(METHODS, desc="     adapting", unit="way", disable=None):
        particles = str(out / "source" / method.name) if method.particles else "none"
        run_dir = out / "target" / method.name
        with redirect_stderr(log):
            run_adapt(recipe, particles, run_dir, None, resume=False, overwrite=False)
        results = json.loads((run_dir / RESULTS).read_text())
        scores[method.name] = {task: results["tasks"][task]["scores"] for task in TARGETS}
    return scores


def _losses(out: Path) -> dict[str, tuple[list[int], list[list[float]]]]:
    """(steps, loss of each particle at each of them) of the source stages."""
    losses = {}
    for method in METHODS:
        if method.particles:
            lines = (out / "source" / method.name / METRICS).read_text().splitlines()
            values = [json.loads(line) for line in lines]
            losses[method.name] = ([v["step"] for v in values], [v["losses"] for v in values])
    return losses


def _write_figures(out: Path, recipe: Recipe, scores: Scores, seconds: float) -> None:
    figures = {
        "shots": recipe.target.shots,
        "seeds": list(SEEDS),
        "test_rows": ROWS["test"],
        "seconds": round(seconds, 1),
        "versions": versions(),
        "accuracy": scores,
    }
    write_atomically(out / "demo.json", (json.dumps(figures, indent=2) + "\n").encode())


def with_mean(by_task: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The scores of each seed by task, and under `mean` each seed's mean over the tasks."""
    return {**{t: list(v) for t, v in by_task.items()}, "mean": [mean(v) for v in zip(*by_task.values(), strict=True)]}


def score_lines(recipe: Recipe, scores: Scores) -> str:
    """A line a method: mean and sample standard deviation over the seeds, of each target and of their mean."""
    heading = f"accuracy, {recipe.target.shots} labelled rows"
    lines = [f"{heading:<28}" + "".join(f"{task:>15}" for task in (*TARGETS, "mean"))]
    for method in METHODS:
        cells = [mean_and_spread(values) for values in with_mean(scores[method.name]).values()]
        lines.append(f"{method.title:<28}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join([*lines, f"test rows of each task: {ROWS['test']}, two labels; ± over {len(SEEDS)} seeds"])


def _closing(folder: Path) -> str:
    text = "topic: course text: tomorrow she saw five lovely tiny red soup in the forest"
    run = shlex.quote(f"{folder}/target/bmtpt/runs/course-0")
    return f"""Picture:             {folder}/demo.png
Figures:             {folder}/demo.json
Everything printed:  {folder}/demo.log
Next:
  tensorboard --logdir {shlex.quote(str(folder))}
  echo "{text}" | bmtpt predict --prompt {run}
  bmtpt source --config first_run --run-dir runs/source      # a real T5 and real tasks, from the hub"""
