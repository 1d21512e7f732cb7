"""A plan for a person: tables, and a picture of how a step's time falls with the number of ranks."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from bmtpt_ds.experiments.planning.cluster import GB, Cluster
from bmtpt_ds.experiments.planning.job import Job
from bmtpt_ds.experiments.planning.predict import Prediction
from bmtpt_ds.readable import duration, short_time
from bmtpt_ds.stage_inputs import particle_ranks


def text(
    job: Job,
    given: Sequence[str],
    cluster: Cluster,
    layouts: Sequence[Prediction],
    best: Prediction | None,
    growth: Sequence[Prediction],
) -> str:
    """All tables, and what to use."""
    parts = [_about(job, cluster), _layout_table(job, layouts), _advice(job, given, cluster, best, growth)]
    if growth:
        parts.append(_growth_table(job, growth))
    return "\n\n".join(parts)


def _about(job: Job, cluster: Cluster) -> str:
    recipe, source, kind = job.recipe, job.recipe.source, "CPU rank" if cluster.on_cpu else "GPU"
    rows = source.kappa * source.rows_per_task
    blocks = particle_ranks(source, cluster.ranks)
    grid = f" in {blocks} blocks on ranks of their own" if blocks > 1 else ""
    nodes = f"{cluster.nodes} nodes of " if cluster.nodes > 1 else ""
    speeds = f"{cluster.inside.bytes_per_second / GB:.3g} GB/s between them"
    if cluster.nodes > 1:
        speeds += f", {cluster.between.bytes_per_second / GB:.3g} GB/s between nodes"
    return (
        f"{recipe.model.name_or_path}: {job.architecture.parameters:,} parameters, {recipe.model.dtype}\n"
        f"{source.particles} particles of {recipe.prompt.length} x {job.architecture.hidden_size}{grid}, "
        f"{rows} rows a step, {job.cells} cells (rows times particles)\n"
        f"{nodes}{cluster.gpus} {kind}{'s' * (cluster.gpus > 1)} of {cluster.memory / GB:.3g} GB, "
        f"{cluster.flops / 1e12:.3g} TFLOP/s each in T5's passes, {speeds}"
    )


def _layout_table(job: Job, layouts: Sequence[Prediction]) -> str:
    def row(title: str, show: Callable[[Prediction], str]) -> str:
        return f"{title:42}" + "".join(f"{show(p):>15}" for p in layouts)

    def gigabytes(title: str, part: str) -> str:
        return row(title, lambda p: f"{getattr(p.memory, part) / GB:.2f}")

    return "\n".join(
        [
            row("--deepspeed_config", lambda p: p.layout),
            "GB of a rank",
            gigabytes("  CUDA and its libraries", "context"),
            gigabytes("  weights", "weights"),
            gigabytes("  weights gathered for a block", "gathered"),
            gigabytes("  particles, gradients, moments", "particles"),
            gigabytes("  activations of a micro-batch", "activations"),
            gigabytes("  its logits", "logits"),
            row("  needed", lambda p: f"{p.memory.needed / GB:.2f}"),
            row("  fits", lambda p: "yes" if p.memory.fits else "NO"),
            "of a rank's whole share, at once",
            gigabytes("  activations kept", "share_kept"),
            gigabytes("  activations recomputed", "share_recomputed"),
            "a step",
            row("  micro-batches of a rank", lambda p: str(p.passes)),
            row("  activations", lambda p: "recomputed" if p.recomputed else "kept"),
            row("  compute", lambda p: short_time(p.compute)),
            row("  gathering weights", lambda p: short_time(p.gathering)),
            row("  gradients and particles on the wire", lambda p: short_time(p.traffic)),
            row("  SVGD", lambda p: short_time(p.svgd)),
            row("  all", lambda p: short_time(p.step)),
            row(f"{job.recipe.source.steps:,} steps", lambda p: duration(p.step * job.recipe.source.steps)),
        ]
    )


def _advice(
    job: Job, given: Sequence[str], cluster: Cluster, best: Prediction | None, growth: Sequence[Prediction]
) -> str:
    if best is None:
        enough = next((p for p in growth if p.ranks > cluster.ranks), None)
        mend = f"it does from {enough.ranks} such ranks on ({enough.layout})" if enough else "larger devices are needed"
        return f"Nothing fits on {cluster.ranks} rank{'s' * (cluster.ranks > 1)}: {mend}."
    where = "--hostfile hosts " if cluster.nodes > 1 else f"--num_gpus {cluster.gpus} "
    command = f"deepspeed {where}--module bmtpt_ds source {shlex.join(given)} --deepspeed_config {best.layout}"
    idle = cluster.ranks - job.cells
    beyond = f" A step has {job.cells} cells: {idle} of {cluster.ranks} ranks have none." if idle > 0 else ""
    return f"Use {best.layout}:{beyond}\n  {command} --run-dir runs/source"


def _growth_table(job: Job, growth: Sequence[Prediction]) -> str:
    steps, first = job.recipe.source.steps, growth[0]
    lines = [
        f"{'ranks':>5} {'nodes':>5} {'layout':14}{'GB':>7}{'compute':>10}{'gathering':>11}{'wire':>10}{'step':>10}"
        f"{'speed-up':>10}  {steps:,} steps"
    ]
    for p in growth:
        parts = f"{short_time(p.compute):>10}{short_time(p.gathering):>11}{short_time(p.traffic):>10}"
        lines.append(
            f"{p.ranks:5} {p.nodes:5} {p.layout:14}{p.memory.needed / GB:7.1f}{parts}{short_time(p.step):>10}"
            f"{first.step / p.step:10.1f}  {duration(p.step * steps)}"
        )
    if growth[-1].ranks > job.cells:
        lines.append(f"A step has {job.cells} cells; ranks beyond that many have nothing to compute.")
    return "\n".join(lines)


def plot(job: Job, growth: Sequence[Prediction], file: Path) -> None:
    """Draws the seconds of a step, and their parts, against the number of ranks into `file` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    ranks = [p.ranks for p in growth]
    for part, colour, title in (
        ("compute", "#1f4e8c", "compute"),
        ("gathering", "#e08a1e", "gathering weights"),
        ("traffic", "#7b4ea3", "gradients and particles"),
    ):
        seconds = [getattr(p, part) or None for p in growth]
        if any(seconds):  # 0 has no place on a logarithmic axis
            axes.plot(ranks, seconds, "o-", ms=3, lw=1.3, color=colour, label=title)
    axes.plot(ranks, [p.step for p in growth], "o-", ms=4, lw=2.2, color="black", label="step")
    axes.axvline(job.cells, color="#8a8a8a", lw=0.9, ls=":")
    axes.annotate(
        f"{job.cells} cells", (job.cells, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
        textcoords="offset points", fontsize=9, color="#555555",
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="seconds a step, predicted")
    axes.set_xticks(ranks, [str(n) for n in ranks], fontsize=9)
    axes.set_xticks([], minor=True)
    axes.set_title(f"{job.recipe.model.name_or_path}: a step of the source stage")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)
