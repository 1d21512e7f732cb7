"""What README says of `first_run`: the recipe on a real T5, beside the same adaptation without the posterior.

By the project's commands, as README has them: `source` by deepspeed on two CPU ranks under ZeRO-3 (seed 0); then, in a
process each, `adapt` from the posterior's mean and from vocabulary rows (`--particles none`), three seeds a task, to
MRPC, which no source task is like, and to Yelp's reviews, which are what SST-2's are about; `evaluate` of the
particles' mean at zero shots.

    python -m tests.benchmarks.first_run MODEL DATA [--dtype bfloat16] [--folder DIR] [--out FILE]

MODEL is a folder or a name on the hub, DATA a folder with rows of the tasks. --folder keeps the runs: what is finished
there is not done again. FILE.png is the plot. Ends with one JSON line. A quarter of an hour on two CPU cores.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from bmtpt_ds.experiments.reporting.records import read_lines
from bmtpt_ds.experiments.reporting.source_plots import scale_positive
from bmtpt_ds.files import write_atomically
from bmtpt_ds.readable import plus_minus
from bmtpt_ds.run_files import METRICS, RESULTS, RUNS
from tests.launch import deepspeed, plain, run

TARGETS = {"mrpc": "MRPC", "yelp": "Yelp"}
STARTS = {"mean": "from the posterior's mean", "none": "from vocabulary rows"}
SEEDS = (0, 1, 2)
LIMIT = 3600.0  # seconds a command


def measure(model: str, data: Path, dtype: str, folder: Path) -> dict[str, Any]:
    settings = [f"model.name_or_path={model}", f"data.root={data}", f"model.dtype={dtype}"]
    recipe = ("--config", "first_run", *(word for setting in settings for word in ("--set", setting)))
    source = folder / "source"
    stage = ("source", *recipe, "--deepspeed_config", "zero3_cpu", "--run-dir", source, "--resume")
    run(deepspeed(2, "--module", "bmtpt_ds", *stage), folder / "source.log", seconds=LIMIT)
    scores, losses = {}, {}
    for start in STARTS:
        place = folder / start
        targets = ("--set", f"target.tasks=[{', '.join(TARGETS)}]", "--set", f"target.seeds={list(SEEDS)}")
        particles = source if start == "mean" else "none"
        adapt = ("adapt", *recipe, *targets, "--particles", particles, "--run-dir", place, "--resume")
        run(plain(*adapt), folder / f"{start}.log", seconds=LIMIT)
        scores[start] = json.loads((place / RESULTS).read_text())["tasks"]
        losses[start] = {
            f"{t}-{seed}": read_lines(place / RUNS / f"{t}-{seed}" / METRICS) for t in TARGETS for seed in SEEDS
        }
    zero_shot = folder / "zero_shot.json"
    evaluate = ("evaluate", "--prompt", source, "--task", *TARGETS, "--json", zero_shot)
    run(plain(*evaluate), folder / "zero_shot.log", seconds=LIMIT)
    return {
        "versions": json.loads((source / RESULTS).read_text())["versions"],
        "source": read_lines(source / METRICS),
        "zero_shot": json.loads(zero_shot.read_text())["tasks"],
        "adapted": scores,
        "target": losses,
    }


def table(found: Mapping[str, Any]) -> str:
    lines = ["accuracy on the test rows   " + "".join(f"{title:>16}" for title in TARGETS.values())]
    zero_shot = [found["zero_shot"][task] for task in TARGETS]
    rows = {"the mean at zero shots": [f"{score['score']:.1f}" for score in zero_shot]}
    for start, title in STARTS.items():
        of_tasks = [found["adapted"][start][task] for task in TARGETS]
        rows[title] = [plus_minus(scored["score"], scored["std"]) for scored in of_tasks]
    rows["majority class"] = [f"{score['majority']:.1f}" for score in zero_shot]
    return "\n".join(lines + [f"{title:<28}" + "".join(f"{cell:>16}" for cell in row) for title, row in rows.items()])


def plot(found: Mapping[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (source, target, scores) = plt.subplots(
        1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(1, 1, 0.8)
    )
    steps = [line for line in found["source"] if "losses" in line]
    for i, losses in enumerate(zip(*(line["losses"] for line in steps), strict=True)):
        source.plot([line["step"] for line in steps], losses, lw=1.2, label=f"particle {i + 1}")
    scale_positive(source, [loss for line in steps for loss in line["losses"]])
    source.set(title="Source: SST-2, RTE, CoLA", xlabel="step", ylabel="loss (nats a target token)")
    source.legend(frameon=False)
    for start, colour in zip(STARTS, ("#1f6fb4", "#a8a8a8"), strict=True):
        for seed in SEEDS:
            lines = [line for line in found["target"][start][f"yelp-{seed}"] if "loss" in line]
            title = STARTS[start] if seed == SEEDS[0] else None
            target.plot(
                [line["step"] for line in lines], [line["loss"] for line in lines], color=colour, lw=1.2, label=title
            )
        _draw_scores(scores, found["adapted"][start], -0.2 if start == "mean" else 0.2, colour)
    target.set(title="Target: Yelp, 32 rows, 3 seeds", xlabel="step", ylabel="loss", yscale="log")
    target.legend(frameon=False, fontsize=9)
    for place, task in enumerate(TARGETS):
        majority = found["zero_shot"][task]["majority"]
        title = "majority class" if place == 0 else None
        scores.plot([place - 0.42, place + 0.42], [majority] * 2, color="black", ls=":", lw=1.2, label=title)
    scores.set(title="Test accuracy", ylim=(0, 100))
    scores.legend(frameon=False, fontsize=9, loc="upper left")
    scores.set_xticks(range(len(TARGETS)), TARGETS.values())
    for axes in (source, target, scores):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _draw_scores(axes, tasks: Mapping[str, Any], shift: float, colour: str) -> None:
    for place, task in enumerate(TARGETS):
        of_seeds = tasks[task]["scores"]
        axes.bar(place + shift, tasks[task]["score"], 0.38, color=colour)
        axes.plot([place + shift] * len(of_seeds), of_seeds, "o", ms=3.5, color="black", alpha=0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
        measured = measure(model, options.data.resolve(), options.dtype, folder.resolve())
    found = {"date": str(date.today()), "model": Path(model).name, "dtype": options.dtype, **measured}
    print(table(found))
    if options.out:
        write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())
        plot(found, options.out.with_suffix(".png"))
    print(json.dumps({key: found[key] for key in ("zero_shot", "adapted")}))


if __name__ == "__main__":
    main()
