"""A profile for a person: a table, and a picture with a bar a model."""

from collections.abc import Sequence
from operator import truediv
from pathlib import Path

from bmtpt_ds.readable import readable_bytes, short_time

# appendix C: T5-base, five particles of 100 tokens, six tasks; one RTX 3090
PAPER = {"svgd": 0.0035, "backward": 0.42, "prior": 0.00011, "forward": 0.16}

_WHAT = {  # in the order of a step
    "data": "waiting for the next step's rows",
    "forward": "",
    "backward": "",
    "gather": "gradients over the ranks",
    "prior": "its gradient",
    "update": "of W, a and b",
    "svgd": "",
    "broadcast": "moved prompts to the ranks",
    "other": "all else",
}
_COLOURS = {
    "data": "#9a9a9a",
    "forward": "#5b9bd5",
    "backward": "#1f4e8c",
    "gather": "#e08a1e",
    "prior": "#7b4ea3",
    "update": "#b48ad6",
    "svgd": "#c0392b",
    "broadcast": "#f2c078",
    "other": "#d9d9d9",
}


def table(profile: dict) -> str:
    """One model's figures."""
    stage = profile["zero"]["stage"]
    where = f"{profile['ranks']} x {profile['device']['name']}"
    where += f" on {profile['nodes']} nodes" if profile["nodes"] > 1 else ""
    layout = "sharded (ZeRO-3)" if stage == 3 else "resident"
    kept = "recomputed" if profile["recomputed"] else "kept"
    lines = [
        f"{profile['model']}: {profile['parameters']:,} parameters, {profile['dtype']}, {layout} on {where}; "
        f"activations {kept}"
    ]
    for name, of_stage in profile["stages"].items():
        lines += ["", *_stage(name, of_stage, profile)]
    return "\n".join(lines)


def _stage(name: str, stage: dict, profile: dict) -> list[str]:
    whole = stage["seconds"]["step"]["mean"]
    lines = [_title(name, stage, profile), f"{'':12}{'median':>12}{'middle 80%':>26}{'share':>9}"]
    for phase in [phase for phase in _WHAT if phase in stage["seconds"]] + ["step"]:
        spent = stage["seconds"][phase]
        between = f"{short_time(spent['low'])} to {short_time(spent['high'])}"
        share = f"{spent['mean'] / whole:.1%}"
        lines.append(
            f"{phase:12}{short_time(spent['median']):>12}{between:>26}{share:>9}  {_WHAT.get(phase, '')}".rstrip()
        )
    if "svgd_over_backward" in stage:
        ratio, how = stage["svgd_over_backward"], stage["svgd"]
        lines.append(f"SVGD / backward: {ratio:.3%} ({how}); the paper's {_paper('svgd', 'backward')}")
    if "prior" in stage["seconds"]:
        ratio, how = truediv(*(stage["seconds"][name]["median"] for name in ("prior", "forward"))), stage["prior"]
        lines.append(
            f"prior / forward: {ratio:.3%} ({how}, with its gradient); "
            f"the paper's {_paper('prior', 'forward')}, without"
        )
    if "capture_seconds" in stage:
        lines.append(f"CUDA graphs; a step of rows whose size is new: {short_time(stage['capture_seconds'])}")
    lines.append(_work(stage, profile))
    lines.append(f"peak memory of a rank: {readable_bytes(stage['peak_memory'])}")
    if profile["ranks"] > 1:
        lines.append(_wire(stage["wire"], profile))
    return lines


def _paper(part: str, whole: str) -> str:
    return f"{short_time(PAPER[part])} / {short_time(PAPER[whole])} = {PAPER[part] / PAPER[whole]:.2%}"


def _title(name: str, stage: dict, profile: dict) -> str:
    prompts = f"{profile['particles']} particles x " if name == "source" else ""
    runs = f", {stage['runs']} runs side by side" if stage.get("runs", 1) > 1 else ""
    rows = f"{prompts}{stage['rows']} rows of {', '.join(stage['tasks'])}"
    passes = f"{stage['passes']} {'passes' if stage['passes'] > 1 else 'pass'} a rank"
    return f"{name} stage: {rows}{runs}; {stage['tokens']:,.0f} tokens, {passes}"


def _work(stage: dict, profile: dict) -> str:
    rate, peak = stage["model_flops_per_second"], profile["device"]["matmul_flops"]
    again = stage["computed_flops_per_second"] / rate - 1 if rate else 0
    recomputed = f", {again:.0%} more recomputed" if again > 0.005 else ""
    what = "forward + gradients of activations"
    return (
        f"model FLOP/s of a rank ({what}): {_flops(rate)}, {stage['share_of_peak']:.0%} of the {_flops(peak)} "
        f"that large products reach{recomputed}"
    )


def _wire(wire: dict, profile: dict) -> str:
    parts = [f"gradients {readable_bytes(wire['gradients'])}", f"moved prompts {readable_bytes(wire['prompts'])}"]
    if wire["gathers"]:
        parts.append(f"weights {readable_bytes(wire['weights'])} in {wire['gathers']} gathers")
    link = profile["link"]
    speed = f"{readable_bytes(round(link['bytes_per_second']))}/s, {short_time(link['latency'])} a hop"
    return f"a rank sends in a step: {', '.join(parts)}; links: {speed}"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def plot(profiles: Sequence[dict], file: Path) -> None:
    """Draws a stacked bar a model, of each stage that was measured, into `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for profile in profiles for name in profile["stages"]))
    figure, panels = plt.subplots(
        1, len(names), figsize=(max(4.2, 2.4 + len(profiles)) * len(names), 4.6), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        _bars(axes, name, [profile for profile in profiles if name in profile["stages"]])
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _bars(axes, name: str, profiles: Sequence[dict]) -> None:
    stages = [profile["stages"][name] for profile in profiles]
    wholes = [stage["seconds"]["step"]["mean"] for stage in stages]
    bottoms = [0.0] * len(stages)
    for phase in _WHAT:
        heights = [
            100 * stage["seconds"].get(phase, {"mean": 0.0})["mean"] / whole
            for stage, whole in zip(stages, wholes, strict=True)
        ]
        if any(heights):
            axes.bar(range(len(stages)), heights, 0.62, bottom=bottoms, color=_COLOURS[phase], label=phase)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for x, (stage, top) in enumerate(zip(stages, bottoms, strict=True)):
        ratio = f"\nSVGD {stage['svgd_over_backward']:.2%}\nof backward" if "svgd_over_backward" in stage else ""
        axes.text(
            x, top + 1, f"{short_time(stage['seconds']['step']['median'])}{ratio}", ha="center", va="bottom", fontsize=9
        )
    axes.set_xticks(range(len(stages)), [_label(profile) for profile in profiles], fontsize=9)
    axes.set(xlim=(-0.6, len(stages) - 0.4), ylim=(0, 128), ylabel="share of a step, % (means)")
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(f"{name} stage, time of a step")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def _label(profile: dict) -> str:
    name = Path(profile["model"]).name
    layout = "ZeRO-3" if profile["zero"]["stage"] == 3 else "resident"
    return f"{name}\n{profile['ranks']} x {layout}"
