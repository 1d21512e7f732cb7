"""What a source task that contradicts the others does to an average of prompts, to joint training and to BMTPT.

The demo's toy world and recipe. Its four source tasks (film, meal, hotel, song) follow one rule; the labels of a fifth
say the opposite: `novel_swapped`, a kind of its own, which a prompt could tell by its topic, or `song_swapped`, more
rows of `song`, which nothing tells from those of `song`. `novel`, the same rows with labels that agree, is the control.

For each set of sources and each seed, by the project's commands: `source` with the methods spot, vanilla_transfer,
bmtpt (M = 5) and mpt, equally many steps; `evaluate` at zero shots, on all sources and three unseen targets, of the
mean of SPoT's prompts, of each of them, of vanilla transfer's prompt, of the mean of BMTPT's particles and of each of
them; `adapt` to the targets with six labelled rows, three seeds a source run (not of the control). Losses are of the
sources' test rows, a row's the mean over its target's tokens; distances are between the agreeing sources' prompts of
SPoT, and between particles.

    python -m tests.benchmarks.conflicting_sources [--folder DIR] [--steps 100] [--zero-shots-only] [--out FILE]

12 to 27 minutes on one CPU core. --folder keeps model and runs: what is finished there is not done again. FILE.png is
the plot. Ends with one JSON line.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import torch
import yaml

from bmtpt_ds.checkpoint import read_tensors, write_tensors
from bmtpt_ds.cli import main as bmtpt
from bmtpt_ds.config import Recipe, load_recipe
from bmtpt_ds.data.tokens import collate
from bmtpt_ds.experiments.demo import ROWS, TARGETS
from bmtpt_ds.experiments.toy_model import toy_model
from bmtpt_ds.experiments.toy_world import SHARED_RULE, rows_of
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.run_files import CONFIG, PARTICLES, RESULTS
from bmtpt_ds.session import at_work, load_rows, open_session, start, versions
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import get_task

AGREEING = ("film", "meal", "hotel", "song")
CONTROL = "fifth agrees"  # is not adapted
FIFTH = {  # set of sources -> the fifth, its topic, whether its labels are swapped
    "agreeing": None,
    CONTROL: ("novel", "novel", False),
    "fifth contradicts": ("novel_swapped", "novel", True),
    "song contradicts": ("song_swapped", "song", True),
}
OWN_LABELS = {"novel": ["finish", "drop"], "song": ["play", "skip"]}  # by topic; song's are the demo's
WAYS = {  # to a prompt from the sources
    "average": "mean of SPoT's prompts",
    "single": "a prompt of SPoT's (mean of the agreeing four)",
    "vanilla_transfer": "vanilla transfer",
    "bmtpt": "BMTPT, mean of 5 particles",
    "particle": "a particle of BMTPT's (mean of the five)",
}
STARTS = {  # method of `adapt` -> method of the source run that it begins at
    "spot": "spot",
    "attempt": "spot",
    "mpt": "mpt",
    "vanilla_transfer": "vanilla_transfer",
    "bmtpt": "bmtpt",
}
SEEDS, TARGET_SEEDS = (0, 1, 2), (0, 1, 2)


# --- the world -------------------------------------------------------------------------------------------------------


def make_world(folder: Path) -> Path:
    """Model, rows and recipe in `folder`; the recipe's path."""
    fifths = [fifth for fifth in FIFTH.values() if fifth]
    own = {name: {"source": ["topic", "text"], "target": "label", "labels": OWN_LABELS[t]} for name, t, _ in fifths}
    values = {
        "defaults": "demo",
        "model": {"name_or_path": str(folder / "model")},
        "evaluate": {"batch_size": 100},
        "data": {"root": str(folder / "tasks"), "tasks": own},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    tasks = load_recipe(str(path)).data.tasks
    with StopSignal() as stop:
        toy_model(folder / "model", [get_task(n, tasks) for n in (*AGREEING, "novel", *TARGETS)], stop)
    for name, topic, swapped in fifths:
        write_rows(folder / "tasks" / name, topic, f"rows of {topic}{' again' * (topic == 'song')}", swapped=swapped)
    for topic in (*AGREEING, *TARGETS):
        write_rows(folder / "tasks" / topic, topic, f"rows of {topic}", swapped=False)  # the demo's
    return path


def write_rows(folder: Path, topic: str, drawn_as: str, *, swapped: bool) -> None:
    rows = iter(rows_of(topic, SHARED_RULE, sum(ROWS.values()), Random(drawn_as)))
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        own = [next(rows) for _ in range(count)]
        lines = [json.dumps(row | {"label": 1 - row["label"] if swapped else row["label"]}) + "\n" for row in own]
        (folder / f"{split}.jsonl").write_text("".join(lines))


# --- the commands ----------------------------------------------------------------------------------------------------


def command(*words: object, **values: object) -> None:
    """Runs a command of bmtpt; what it prints goes to the log, which is sys.stderr's place meanwhile."""
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    assert bmtpt([*map(str, words), *sets]) == 0, f"bmtpt {' '.join(map(str, words))} failed; see the log"


def learn(recipe: Path, folder: Path, sources: Sequence[str], methods: Sequence[str], seed: int, steps: int) -> None:
    """A source run of each method in `folder`/<method>."""
    for method in methods:
        own = {"method": method, "run.seed": seed, "source.tasks": f"[{', '.join(sources)}]", "source.steps": steps}
        command("source", "--config", recipe, "--run-dir", folder / method, "--resume", **own)


def write_prompt_as_run(source: Path, folder: Path, prompt: torch.Tensor) -> None:
    """A prompt [L, H] as the one particle of a source run of BMTPT, made of a run of another method."""
    config = yaml.safe_load((source / CONFIG).read_text()) | {"method": "bmtpt"}
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    state = read_tensors(source / PARTICLES).state | {"method": "bmtpt"}
    write_tensors(folder / PARTICLES, {"particles": prompt[None]}, state)


def prompts_of(folder: Path, sources: Sequence[str]) -> dict[str, Path]:
    """Source runs of one prompt for every task: the mean of SPoT's, each of them, vanilla transfer's, the mean of
    BMTPT's particles, each of them."""
    spot, particles = (read_tensors(folder / name / PARTICLES).tensors["particles"] for name in ("spot", "bmtpt"))
    made = {"average": spot.mean(dim=0), **{f"spot of {name}": spot[k] for k, name in enumerate(sources)}}
    made |= {f"particle {i}": particle for i, particle in enumerate(particles)}
    for name, prompt in made.items():
        write_prompt_as_run(folder / "spot", folder / name, prompt)
    return {name: folder / name for name in (*made, "vanilla_transfer", "bmtpt")}


def zero_shot(run: Path, tasks: Sequence[str]) -> dict[str, float]:
    """Test accuracy of a run's prompt on each task, the answers generated."""
    file = run / "zero_shot.json"
    command("evaluate", "--prompt", run, "--json", file, "--task", *tasks)
    return {name: score["score"] for name, score in json.loads(file.read_text())["tasks"].items()}


def adapt(recipe: Path, source: Path | str, folder: Path, method: str) -> dict[str, list[float]]:
    """Test accuracy on each target with six labelled rows, of each of TARGET_SEEDS."""
    own = {"method": method, "target.tasks": f"[{', '.join(TARGETS)}]", "target.seeds": list(TARGET_SEEDS)}
    command("adapt", "--config", recipe, "--particles", source, "--run-dir", folder, "--resume", **own)
    tasks = json.loads((folder / RESULTS).read_text())["tasks"]
    return {name: tasks[name]["scores"] for name in TARGETS}


def distances(folder: Path) -> dict[str, float]:
    """Mean Euclidean distance between two of SPoT's prompts for the agreeing sources, and between two particles."""
    of = {
        method: read_tensors(folder / method / PARTICLES).tensors["particles"].flatten(1)
        for method in ("spot", "bmtpt")
    }
    return {
        "spot": torch.pdist(of["spot"][: len(AGREEING)]).mean().item(),
        "bmtpt": torch.pdist(of["bmtpt"]).mean().item(),
    }


def chosen_sources(run: Path) -> list[str]:
    """At whose prompt SPoT's runs began."""
    similarities = json.loads((run / "probe" / "similarity.json").read_text())
    return [max(of_run, key=of_run.get) for of_run in similarities.values()]


@torch.no_grad()
def losses_of(recipe: Recipe, runs: Mapping[str, Path], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean loss of each run's prompt on the test rows of each task."""
    tasks = [get_task(name, recipe.data.tasks) for name in names]
    ds, ranks = start(recipe, None)
    found: dict[str, dict[str, float]] = {run: {} for run in runs}
    with at_work(ranks) as stop:
        splits = load_rows(ranks, recipe, tasks)
        session = open_session(recipe, ranks, ds, ROWS["test"], stop)
        backbone = session.model.backbone.eval()
        for task, rows in zip(tasks, splits, strict=True):
            (batch,) = collate([session.encoder.encode_all(task, rows.test)], session.encoder.pad_id).on(ranks.device)
            for run, folder in runs.items():
                prompt = read_tensors(folder / PARTICLES).tensors["particles"].mean(dim=0)
                of_rows = backbone.row_losses(prompt.expand(len(rows.test), *prompt.shape), [batch])
                found[run][task.name] = of_rows.mean().item()
    return found


# --- the experiment --------------------------------------------------------------------------------------------------


def measure(folder: Path, steps: int, *, adapts: bool) -> dict:
    recipe, runs = make_world(folder), folder / "runs"
    found: dict[str, list] = {kind: [] for kind in FIFTH}
    sources = {kind: [*AGREEING, *(fifth or ())[:1]] for kind, fifth in FIFTH.items()}
    for seed in SEEDS:
        for kind, names in sources.items():
            print(f"seed {seed}, {kind}", file=sys.__stderr__, flush=True)
            place = runs / f"{seed}-{kind.replace(' ', '_')}"
            adapted = STARTS if adapts and kind != CONTROL else {}
            found[kind].append(of_sources(recipe, place, names, seed, steps, adapted))
    scratch = adapt(recipe, "none", runs / "prompt_tuning", "prompt_tuning") if adapts else None
    return {"sources": sources, "from_scratch": scratch, "runs": found}


def of_sources(
    recipe: Path, place: Path, sources: Sequence[str], seed: int, steps: int, adapted: Mapping[str, str]
) -> dict:
    """Every figure of one seed of a set of sources.

    Args:
        adapted: methods of `adapt`, and of the source runs that they begin at.
    """
    learn(recipe, place, sources, ["spot", "vanilla_transfer", "bmtpt", *(["mpt"] if adapted else [])], seed, steps)
    prompts = prompts_of(place, sources)
    found = {
        "accuracy": {name: zero_shot(run, [*sources, *TARGETS]) for name, run in prompts.items()},
        "loss": losses_of(load_recipe(str(recipe)), prompts, sources),
        "distance": distances(place),
        "adapted": {
            method: adapt(recipe, place / at, place / f"to-{method}", method) for method, at in adapted.items()
        },
    }
    return found | ({"spot_began_at": chosen_sources(place / "to-spot")} if adapted else {})


# --- what came out ---------------------------------------------------------------------------------------------------

Figure = dict[str, dict[str, list[float]]]  # set of sources -> way or method -> value of each seed
FIGURES = {
    "targets": "accuracy on unseen targets, zero shots",
    "sources": "accuracy on the four agreeing sources",
    "fifth": "accuracy on the fifth source, by its own labels",
    "loss_agreeing": "loss of the four agreeing sources",
    "loss_fifth": "loss of the fifth source",
    "loss": "mean loss of all sources",
    "adapted": "accuracy on the targets, 6 labelled rows",
}


def way_of(by_prompt: Mapping[str, Mapping[str, float]], way: str, names: Sequence[str]) -> float:
    """A way's mean over tasks; of `single` over the agreeing sources' prompts too, of `particle` over the particles."""
    prompts = [f"spot of {name}" for name in AGREEING] if way == "single" else [way]
    if way == "particle":
        prompts = [prompt for prompt in by_prompt if prompt.startswith("particle ")]
    return fmean(by_prompt[prompt][name] for prompt in prompts for name in names)


def summary(found: Mapping) -> dict[str, Figure]:
    figures: dict[str, Figure] = {name: {} for name in FIGURES}
    for kind, runs in found["runs"].items():
        sources = found["sources"][kind]
        fifth = sources[len(AGREEING) :]
        for name, part, tasks in (
            ("targets", "accuracy", TARGETS),
            ("sources", "accuracy", AGREEING),
            ("fifth", "accuracy", fifth),
            ("loss_agreeing", "loss", AGREEING),
            ("loss_fifth", "loss", fifth),
            ("loss", "loss", sources),
        ):
            if tasks:
                figures[name][kind] = {way: [way_of(run[part], way, tasks) for run in runs] for way in WAYS}
        if all(run["adapted"] for run in runs):
            figures["adapted"][kind] = {
                m: [fmean(map(fmean, run["adapted"][m].values())) for run in runs] for m in STARTS
            }
    return figures


def table(found: Mapping) -> str:
    """Mean and sample standard deviation over the seeds."""
    lines, kinds = [], list(found["runs"])
    for name, by_kind in summary(found).items():
        if not by_kind:
            continue
        lines.append(_heading(FIGURES[name], by_kind))
        digits = 3 if name.startswith("loss") else 1
        for way in next(iter(by_kind.values())):
            title = way if name == "adapted" else WAYS[way]
            lines.append(_line(title, [values[way] for values in by_kind.values()], digits))
    if found["from_scratch"]:
        lines.append(_line("prompt_tuning, from scratch (target seeds)", [of_targets(found["from_scratch"])]))
        began = {kind: [at for run in found["runs"][kind] for at in run.get("spot_began_at", [])] for kind in kinds}
        lines.append(f"runs of spot that began at the fifth's prompt: {_of_fifth(began)}")
    lines.append(_heading("accuracy on unseen targets of each SPoT prompt", kinds))
    for k, title in enumerate((*AGREEING, "the fifth")):
        lines.append(_line(title, [_targets_of_spot(found, kind, k) for kind in kinds]))
    lines.append(_heading("distance", kinds))
    for method, title in (("spot", "of two SPoT prompts (the agreeing four)"), ("bmtpt", "of two particles")):
        lines.append(_line(title, [[run["distance"][method] for run in found["runs"][kind]] for kind in kinds]))
    return "\n".join(lines)


def _targets_of_spot(found: Mapping, kind: str, k: int) -> list[float] | None:
    """Of each seed, the mean over the targets of the k-th source's prompt; None where there are only four."""
    names = found["sources"][kind][k : k + 1]
    return [way_of(run["accuracy"], f"spot of {names[0]}", TARGETS) for run in found["runs"][kind]] if names else None


def of_targets(by_task: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean over the targets, of each seed."""
    return [fmean(of_seed) for of_seed in zip(*by_task.values(), strict=True)]


def _of_fifth(began: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(
        f"{sum(at not in AGREEING for at in of)} of {len(of)} ({kind})" for kind, of in began.items() if of
    )


def _heading(title: str, kinds: Iterable[str]) -> str:
    return f"{title:<50}" + "".join(f"{kind:>19}" for kind in kinds)


def _line(title: str, values: Sequence[Sequence[float] | None], digits: int = 1) -> str:
    cells = [f"{fmean(v):.{digits}f} ± {stdev(v):.{digits}f}" if v else "" for v in values]
    return f"  {title:<48}" + "".join(f"{cell:>19}" for cell in cells)


_COLOURS = ("#3a3a3a", "#a8a8a8", "#e08a1e", "#1f6fb4", "#8fbfe6")  # of WAYS
_OF_METHODS = dict(zip(STARTS, ("#3a3a3a", "#7a5ea8", "#3f8f5b", "#e08a1e", "#1f6fb4"), strict=False))


def plot(found: Mapping, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = summary(found)
    with plt.rc_context({"font.size": 12, "axes.titlesize": 13}):
        figure, panels = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
        (targets, sources), (losses, adapted) = panels
        for axes, name in ((targets, "targets"), (sources, "sources"), (losses, "loss_agreeing")):
            _draw_bars(axes, figures[name], dict(zip(WAYS, _COLOURS, strict=True)), WAYS)
        _draw_bars(adapted, figures["adapted"], _OF_METHODS, {m: m for m in _OF_METHODS})
        for axes in (targets, sources, adapted):
            axes.axhline(50, color="black", lw=0.8, ls=":")
            axes.set(ylim=(0, 105), ylabel="test accuracy, % (points: seeds)")
        scratch = fmean(of_targets(found["from_scratch"]))
        adapted.axhline(scratch, color="black", lw=1.2, ls="--", label="prompt_tuning, from scratch")
        targets.set_title("Unseen targets, zero shots")
        sources.set_title("The four agreeing sources")
        losses.set(title="The four agreeing sources", ylabel="loss, nats a token (points: seeds)", ylim=(0, None))
        adapted.set_title(f"Unseen targets, {found['shots']} labelled rows")
        figure.legend(*targets.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        adapted.set_ylim(0, 139)
        adapted.set_yticks(range(0, 101, 20))
        adapted.legend(frameon=False, fontsize=10, ncols=3, loc="upper center", columnspacing=1, handlelength=1.5)
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=100)
        plt.close(figure)


def _draw_bars(axes, by_kind: Figure, colours: Mapping[str, str], titles: Mapping[str, str]) -> None:
    width = 0.84 / len(colours)
    for k, (way, colour) in enumerate(colours.items()):
        places = [group + (k - (len(colours) - 1) / 2) * width for group in range(len(by_kind))]
        values = [of_kind[way] for of_kind in by_kind.values()]
        spreads = [stdev(of_seeds) for of_seeds in values]
        axes.bar(
            places, list(map(fmean, values)), 0.93 * width, yerr=spreads, capsize=2, color=colour, label=titles[way]
        )
        for place, of_seeds in zip(places, values, strict=True):
            axes.plot([place] * len(of_seeds), of_seeds, "o", ms=3, color="black", alpha=0.5)
    axes.set_xticks(range(len(by_kind)), [kind.replace(" ", "\n") for kind in by_kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=100, help="of the source stages")
    parser.add_argument("--zero-shots-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    Ranks(load_recipe("demo").run.timeout)  # DeepSpeed silences a compiler on the stderr that is there when it begins
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context((folder / "log").open("w"))
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            measured = measure(folder.absolute(), options.steps, adapts=not options.zero_shots_only)
    found = {
        "date": str(date.today()),
        "versions": versions(),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "steps": options.steps,
        "seeds": list(SEEDS),
        "target_seeds": list(TARGET_SEEDS),
        "shots": load_recipe("demo").target.shots,
        "test_rows": ROWS["test"],
        **measured,
    }
    print(table(found))
    line = json.dumps(found)
    if options.out:
        options.out.write_text(line + "\n")
    if options.out and not options.zero_shots_only:
        plot(found, options.out.with_suffix(".png"))
    print(line)


if __name__ == "__main__":
    main()
