"""A plan from beginning to end: every layout on the cluster that was asked about, the best one on 1 to 4096 ranks."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bmtpt_ds.config import Recipe
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.planning.cluster import Cluster
from bmtpt_ds.experiments.planning.job import Job
from bmtpt_ds.experiments.planning.predict import Prediction, predict
from bmtpt_ds.experiments.planning.report import plot, text
from bmtpt_ds.files import check_files, write_atomically
from bmtpt_ds.model.shapes import architecture_by_name
from bmtpt_ds.stage_inputs import check_measured_method, particle_ranks, source_tasks

SIZES = tuple(2**power for power in range(13))  # ranks


@dataclass(frozen=True)
class Plan:
    """What is known before a run."""

    layouts: Sequence[Prediction]  # on the cluster that was asked about
    best: Prediction | None  # of these, the fastest that fits
    growth: Sequence[Prediction]  # the best on each number of ranks on which something fits


def run_plan(
    recipe: Recipe, given: Sequence[str], cluster: Cluster, json_file: Path | None, plot_file: Path | None
) -> str:
    """`bmtpt plan`: what the recipe's source stage takes on a cluster.

    Args:
        given: the words of a command line that stand for the recipe.

    Returns:
        tables for a person.

    Raises:
        UserError: a mistake of the user's; nothing is written.
    """
    check_measured_method(recipe)
    check_files({"--json": json_file, "--plot": plot_file})
    job = Job(architecture_by_name(recipe.model.name_or_path), recipe, source_tasks(recipe))
    made = make_plan(job, cluster)
    if plot_file and not made.growth:
        raise UserError("--plot: nothing fits on any number of such ranks, there is nothing to draw; leave it out")
    if json_file:
        values = {"model": recipe.model.name_or_path, "cluster": asdict(cluster), **asdict(made)}
        write_atomically(json_file, (json.dumps(values, indent=1) + "\n").encode())
    if plot_file:
        plot(job, made.growth, plot_file)
    return text(job, given, cluster, made.layouts, made.best, made.growth)


def make_plan(job: Job, cluster: Cluster) -> Plan:
    """Compares layouts and sizes, those that the recipe's blocks of particles can be dealt to."""
    layouts = [predict(job, cluster, layout) for layout in candidates(cluster)]
    blocks, growth = particle_ranks(job.recipe.source, cluster.ranks), []
    for sized in _sizes(cluster, blocks):
        best = fastest([predict(job, sized, layout) for layout in candidates(sized)])
        if best is not None:
            growth.append(best)
    return Plan(layouts, fastest(layouts), growth)


def _sizes(cluster: Cluster, blocks: int) -> list[Cluster]:
    """From one rank a block on, twice as many each time, on as few nodes as hold them; with blocks also as asked for,
    since whole nodes may not be equal blocks."""
    found = {1: cluster.of_ranks(1)} if blocks == 1 else {cluster.ranks: cluster}
    for count in [blocks * size for size in SIZES if blocks * size <= SIZES[-1]]:
        sized = cluster.of_ranks(count)
        found.setdefault(sized.ranks, sized)
    return [found[ranks] for ranks in sorted(found) if ranks % blocks == 0]


def candidates(cluster: Cluster) -> list[str]:
    """The shipped DeepSpeed JSONs that make a difference there, the simplest first."""
    if cluster.on_cpu:
        return ["resident", "zero3_cpu"]
    return ["resident", "zero3", *(["zero3_hpz"] if cluster.nodes > 1 and cluster.gpus > 1 else []), "zero3_offload"]


def fastest(predictions: Sequence[Prediction]) -> Prediction | None:
    """The least seconds a step of those that fit; of equals the first."""
    fitting = [prediction for prediction in predictions if prediction.memory.fits]
    return min(fitting, key=lambda prediction: prediction.step) if fitting else None
