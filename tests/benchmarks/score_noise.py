"""How much a score says: of the rows that it was computed from, and of the place of the particle.

Takes the particles of a finished source run, draws rows of its tasks as a step does, and compares directions of scores
(gradients of the log-likelihood): at the particles' mean between different rows, and on the same rows between the
particles, as they are and drawn together towards their mean. Where two draws of rows hardly agree, particles that read
the same rows (`source.particle_rows: shared`) add nothing to what one of them says; where two particles hardly agree,
the kernel hands each the scores of places that are not its own.

    python -m tests.benchmarks.score_noise RUN [--rows 8] [--draws 4] [--out FILE]

Rows are per task. Ends with one JSON line.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean

import torch

from bmtpt_ds.checkpoint import read_tensors
from bmtpt_ds.config import Recipe, override_recipe
from bmtpt_ds.data.splits import TaskSplits
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, Prompts
from bmtpt_ds.phases import Phases
from bmtpt_ds.run_files import PARTICLES, read_run_recipe
from bmtpt_ds.session import at_work, load_rows, open_session, start, versions
from bmtpt_ds.source import draw_rows
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import get_task

SHARES = (1.0, 0.3, 0.1, 0.03)  # of the particles' distances from their mean
FRESH = 10**6  # draws of steps that no run has made


class Scores:
    """Directions of scores under one model."""

    def __init__(self, gradient_pass: GradientPass):
        self._pass = gradient_pass

    def of(self, prompts: torch.Tensor, rows: Sequence[TokenRow]) -> torch.Tensor:
        """Unit vectors [P, L * H] of prompts [P, L, H], each over all rows."""
        work = self._pass.prepare(StepRows.evenly(rows), *prompts.shape[:2])
        gradient = self._pass(Prompts(prompts), work, 1, StopSignal()).gradient
        return torch.nn.functional.normalize(gradient.flatten(1), dim=1)


def mean_cosine(units: torch.Tensor) -> float:
    """Over the pairs of unit vectors [P, D]."""
    products = units @ units.T
    pairs = len(units) * (len(units) - 1)
    return ((products.sum() - products.diagonal().sum()) / pairs).item()


def measure(recipe: Recipe, particles: torch.Tensor, rows: int, draws: int) -> dict:
    source = recipe.source.model_copy(
        update={"rows_per_task": rows, "tasks_per_step": "all", "particle_rows": "shared"}
    )
    tasks = [get_task(name, recipe.data.tasks) for name in source.tasks]
    ds, ranks = start(recipe, None)
    with at_work(ranks) as stop:
        splits = [
            TaskSplits(task, of_task) for task, of_task in zip(tasks, load_rows(ranks, recipe, tasks), strict=True)
        ]
        session = open_session(recipe, ranks, ds, rows * len(tasks) * len(particles), stop)
        scores = Scores(GradientPass.of(session, tasks, Phases(ranks.device)))
        drawn = [draw_rows(source, recipe.run.seed, FRESH + i, splits, session.encoder).rows for i in range(draws)]
        mean = particles.mean(dim=0)
        of_draws = torch.cat([scores.of(mean[None], rows_) for rows_ in drawn])
        apart = {
            share: {
                "distance": (particles[0] - particles[1]).norm().item() * share,
                "cosine": fmean(mean_cosine(scores.of(mean + share * (particles - mean), rows_)) for rows_ in drawn),
            }
            for share in SHARES
        }
    return {
        "norm_of_mean": mean.norm().item(),
        "rows_of_a_draw": len(drawn[0]),
        "cosine_of_draws": mean_cosine(of_draws),
        "particles": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished source run of two particles or more")
    parser.add_argument("--rows", type=int, default=8, help="of each task in a draw")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    _, values = read_run_recipe(arguments.run)
    particles = read_tensors(arguments.run / PARTICLES).tensors["particles"]
    found = measure(override_recipe(values, [], str(arguments.run)), particles, arguments.rows, arguments.draws)
    found = {"date": str(date.today()), "versions": versions(), "draws": arguments.draws, **found}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
