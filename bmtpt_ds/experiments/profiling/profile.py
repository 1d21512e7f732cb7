"""A profile from beginning to end: its models one after another, then a table, a JSON file, a picture."""

import gc
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from bmtpt_ds.config import Recipe
from bmtpt_ds.experiments.planning.cluster import PROFILE
from bmtpt_ds.experiments.profiling.bench import Bench, open_bench, tasks_to_profile
from bmtpt_ds.experiments.profiling.report import plot, table
from bmtpt_ds.experiments.profiling.stages import Asked, smallest_pass, source_stage, target_stage
from bmtpt_ds.files import check_files, write_atomically
from bmtpt_ds.model.shapes import shape
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.parallel.measure import measure_device, measure_link
from bmtpt_ds.quiet import say
from bmtpt_ds.session import at_work, start, versions
from bmtpt_ds.source import Posterior
from bmtpt_ds.stage_inputs import particle_ranks


def run_profile(
    recipe: Recipe,
    shapes: Sequence[str],
    json_name: str | None,
    asked: Asked,
    json_file: Path | None = None,
    plot_file: Path | None = None,
) -> str:
    """`bmtpt profile`: measures the steps of the recipe's model, or of published T5s with random weights.

    Args:
        shapes: names of the latter; none: the recipe's model and rows.

    Returns:
        a table for a person; "" on ranks other than 0.

    Raises:
        UserError: a mistake of the user's; nothing is written.
    """
    for name in shapes:
        shape(name)
    tasks_to_profile(recipe, asked.stages)
    ds, ranks = start(recipe, json_name)
    ranks.first_does(lambda: check_files({"--json": json_file, "--plot": plot_file, "--trace": asked.trace}))
    particle_ranks(recipe.source, ranks.world)  # refuses an impossible grid
    found = []
    with at_work(ranks) as stop:
        for name in shapes or [recipe.model.name_or_path]:
            own = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": name})})
            bench = open_bench(ranks, own, ds, stop, asked.stages, random=bool(shapes))
            say(f"{bench.session.describe()}; {bench.session.activations}")
            found.append(_profile(bench, asked))
            del bench
            _forget(ranks)
            if ranks.any(stop.received is not None):
                raise stop.stopped()
    if not ranks.first:
        return ""
    values = {"format": PROFILE, "date": date.today().isoformat(), "versions": versions()}
    values |= {"deepspeed_config": json_name, "profiles": found}
    if json_file:
        write_atomically(json_file, (json.dumps(values, indent=1) + "\n").encode())
    if plot_file:
        plot(found, plot_file)
    return "\n\n".join(table(of_model) for of_model in found)


def _profile(bench: Bench, asked: Asked) -> dict:
    """What is known of a model when its steps are made. All ranks must come together."""
    session, ranks, source = bench.session, bench.session.ranks, bench.session.recipe.source
    device = measure_device(ranks, getattr(torch, session.recipe.model.dtype))
    link = measure_link(ranks)
    posterior = Posterior.start(session.initial_prompts(source.particles), source.optimizer)
    stages = {}
    if bench.sources:
        stages["source"] = source_stage(bench, posterior, device.matmul_flops, asked)
    if bench.runs:
        stages["target"] = target_stage(bench, posterior.particles, device.matmul_flops, asked)
    architecture, model = session.model.architecture, session.recipe.model
    return {
        "model": model.name_or_path,
        "parameters": architecture.parameters,
        "hidden_size": architecture.hidden_size,
        "blocks": architecture.encoder_blocks + architecture.decoder_blocks,
        "dtype": model.dtype,
        "zero": session.model.ds["zero_optimization"],
        "ranks": ranks.world,
        "nodes": max(1, ranks.world // ranks.local_world),
        "recomputed": session.model.backbone.checkpoints_activations,
        "particles": source.particles,
        "prompt_length": session.recipe.prompt.length,
        "device": device._asdict() | {"type": ranks.device.type},
        "link": link._asdict() if link else None,
        "smallest_pass": smallest_pass(session),
        "stages": stages,
    }


def _forget(ranks: Ranks) -> None:
    """Makes room for the next model."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
