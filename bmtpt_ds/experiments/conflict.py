"""The Gaussian world of the paper's appendix A, trained: K source tasks, one of which contradicts the others.

Three ways to one prompt from which a target task starts:
    averaging   a prompt for each task, trained alone; their mean (SPoT and ATTEMPT aggregate such prompts)
    joint       one prompt, trained on the sum of all tasks' losses (vanilla multi-task transfer)
    posterior   particles of the product of all tasks' posteriors, by this project's SVGD; their mean
Each has a closed form, in conflict_world.py. The score is that of the tasks' *sum*, as appendix A has it; a run's
losses are means over the tasks, and its `source.likelihood_scale: K` would be this world.

Symbols: K tasks, L prompt length, H hidden size, D = L * H, M particles. `python -m bmtpt_ds.experiments.conflict`
writes conflict.json and conflict.png.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from bmtpt_ds import __version__
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.conflict_plot import plot_conflict
from bmtpt_ds.experiments.conflict_world import (
    WIDTH,
    H,
    K,
    L,
    World,
    best_weights,
    losses,
    make_world,
    mean_by_precision,
    source_loss,
    target_loss,
)
from bmtpt_ds.files import check_writable, write_atomically
from bmtpt_ds.schedule import learning_rate_factor
from bmtpt_ds.svgd import init_state, svgd_step_

DISTANCES = (0.0, 1.0, 2.0, 3.0)  # of the fourth task's contradiction, in WIDTH
WHERE = ("unsure", "sure")  # directions in which the fourth task contradicts: of its own certainty
M = 10
LR = 0.3  # of adamw; a run's, its warm-up and decay too
PROMPT_STEPS, STEPS = 800, 400  # of a prompt; of particles
SPREADS = (("none", M, 1000), ("paper", M, 1000), ("matched", M, 1000), ("matched", 100, 600))  # damping, M, steps
OTHER_WORLDS = range(1, 51)


# ---- training ----


def train(start: Tensor, loss: Callable[[Tensor], Tensor], optimizer: str, lr: float, steps: int) -> Tensor:
    """Prompts [M, D] after `steps` of torch's `adamw` (weight decay 0; lr as over a run) or of `sgd` (constant lr)."""
    theta = start.clone().requires_grad_()
    kinds = {"adamw": partial(torch.optim.AdamW, weight_decay=0.0), "sgd": torch.optim.SGD}
    torch_optimizer = kinds[optimizer]([theta], lr=lr)
    for step in range(1, steps + 1):
        torch_optimizer.param_groups[0]["lr"] = lr * _factor(step, steps, optimizer)
        torch_optimizer.zero_grad()
        loss(theta).sum().backward()
        torch_optimizer.step()
    return theta.detach()


def train_separately(world: World, optimizer: str = "adamw", lr: float = LR, steps: int = PROMPT_STEPS) -> Tensor:
    """A prompt of each task [K, D]; neither optimizer lets one entry feel another, so one run is K of them."""

    def own_losses(theta_KD: Tensor) -> Tensor:
        return losses(theta_KD, world.modes_KD, world.precisions_KDD).diagonal()

    return train(torch.zeros_like(world.modes_KD), own_losses, optimizer, lr, steps)


def train_jointly(world: World, optimizer: str = "adamw", lr: float = LR, steps: int = PROMPT_STEPS) -> Tensor:
    """One prompt [D] of all tasks."""
    start_1D = torch.zeros_like(world.target_mode_D)[None]
    return train(start_1D, partial(source_loss, world=world), optimizer, lr, steps)[0]


def sample_posterior(
    world: World,
    *,
    particles: int = M,
    damping: str = "paper",
    optimizer: str = "adamw",
    lr: float = LR,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Particles [M, D] from N(0, I) after `steps` of svgd_step_; lr over them as in train."""
    generator = torch.Generator().manual_seed(seed)
    theta_MD = torch.randn(particles, len(world.target_mode_D), generator=generator, dtype=torch.float64)
    state = init_state(theta_MD, optimizer)
    for step in range(1, steps + 1):
        at_MD = theta_MD.detach().requires_grad_()
        (gradient_MD,) = torch.autograd.grad(source_loss(at_MD, world).sum(), at_MD)
        rate = lr * _factor(step, steps, optimizer)
        svgd_step_(theta_MD, -gradient_MD, state, optimizer=optimizer, lr=rate, damping=damping)
    return theta_MD


def _factor(step: int, steps: int, optimizer: str) -> float:
    schedule = "linear" if optimizer == "adamw" else "constant"
    return learning_rate_factor(step, steps=steps, warmup_steps=None, schedule=schedule)


# ---- what is measured ----


def starting_points(world: World) -> dict[str, Tensor]:
    """The prompts [D] that the three ways train, and two mends of the first: weights or precisions that know it all."""
    prompts_KD = train_separately(world)
    total_DD = world.precisions_KDD.sum(0)
    global_D = mean_by_precision(world.modes_KD, world.precisions_KDD)
    return {
        "averaging": prompts_KD.mean(0),
        "best_weights": best_weights(prompts_KD, global_D, total_DD) @ prompts_KD,
        "by_precision": mean_by_precision(prompts_KD, world.precisions_KDD),
        "joint": train_jointly(world),
        "posterior": sample_posterior(world).mean(0),
    }


def closed_forms(world: World) -> dict[str, Tensor]:
    """The same from the modes themselves, without training."""
    modes_KD, global_D = world.modes_KD, mean_by_precision(world.modes_KD, world.precisions_KDD)
    weights_K = best_weights(modes_KD, global_D, world.precisions_KDD.sum(0))
    same = dict.fromkeys(("by_precision", "joint", "posterior"), global_D)
    return {"averaging": modes_KD.mean(0), "best_weights": weights_K @ modes_KD, **same}


def quality(points: dict[str, Tensor], world: World) -> dict[str, dict[str, float]]:
    """Of each point [D], in nats: its summed source loss over the least there is, and its loss on the target task."""
    least_1 = source_loss(mean_by_precision(world.modes_KD, world.precisions_KDD)[None], world)
    theta_MD = torch.stack(list(points.values()))
    values = zip((source_loss(theta_MD, world) - least_1).tolist(), target_loss(theta_MD, world).tolist(), strict=True)
    return {
        name: {"source_excess": excess, "target_loss": target}
        for name, (excess, target) in zip(points, values, strict=True)
    }


def sweep(where: str) -> dict[str, dict]:
    """By distance: quality of what was trained and of the closed forms, and how far (norm) the one is off the other."""
    found = {}
    for distance in DISTANCES:
        world = make_world(distance, where)
        trained, exact = starting_points(world), closed_forms(world)
        off = {name: float(torch.linalg.vector_norm(trained[name] - exact[name])) for name in trained}
        found[f"{distance:g}"] = {"trained": quality(trained, world), "exact": quality(exact, world), "off": off}
    return found


def spread(theta_MD: Tensor, world: World) -> dict[str, float | list[float]]:
    """Widths of the particles (unbiased) and of the posterior along its axes, an eighth of them at a time, wide first.

    `kept`: the trace of the particles' covariance over the posterior's.
    """
    precision_D, axes_DD = torch.linalg.eigh(world.precisions_KDD.sum(0))
    variances_2D = torch.stack([(theta_MD @ axes_DD).var(dim=0), 1 / precision_D])
    widths_28 = variances_2D.reshape(2, 8, -1).mean(2).sqrt()
    traces = variances_2D.sum(1)
    return {"kept": float(traces[0] / traces[1]), "widths": widths_28[0].tolist(), "posterior": widths_28[1].tolist()}


def other_worlds() -> dict[str, dict]:
    """10%, 50% and 90% quantiles over worlds of other seeds, of the closed forms at the ends of the sweep."""
    found: dict[str, dict] = {}
    for where in WHERE:
        for distance in (DISTANCES[0], DISTANCES[-1]):
            worlds = [make_world(distance, where, seed) for seed in OTHER_WORLDS]
            qualities = [quality(closed_forms(world), world) for world in worlds]
            found.setdefault(where, {})[f"{distance:g}"] = {
                name: {key: _quantiles([q[name][key] for q in qualities]) for key in ("source_excess", "target_loss")}
                for name in ("averaging", "best_weights", "joint")
            }
    return found


def _quantiles(values: list[float]) -> list[float]:
    return torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()


def measure() -> dict:
    """Everything that conflict.json holds."""
    began, world = perf_counter(), make_world(DISTANCES[-1])
    sweeps = {where: sweep(where) for where in WHERE}
    spreads = []
    for damping, particles, steps in SPREADS:
        theta_MD = sample_posterior(world, particles=particles, damping=damping, steps=steps)
        spreads.append({"damping": damping, "particles": particles, "steps": steps, **spread(theta_MD, world)})
    return {
        "date": str(date.today()),
        "versions": {"bmtpt_ds": __version__, "torch": version("torch")},
        "setting": {
            "K": K,
            "L": L,
            "H": H,
            "M": M,
            "prompt_steps": PROMPT_STEPS,
            "steps": STEPS,
            "lr": LR,
            "width": WIDTH,
        },
        "sweeps": sweeps,
        "spreads": spreads,
        "other_worlds": other_worlds(),
        "seconds": round(perf_counter() - began, 1),
    }


def lines(found: dict) -> str:
    """What was trained, a line a world; then how wide the particles lie."""
    ways = next(iter(found["sweeps"]["unsure"].values()))["trained"]
    told = ["nats: sources above their minimum / target", " " * 10 + "".join(f"{way:>18}" for way in ways)]
    for where, by_distance in found["sweeps"].items():
        for distance, at in by_distance.items():
            cells = [f"{abs(q['source_excess']):.1f} / {q['target_loss']:.1f}" for q in at["trained"].values()]
            told.append(f"{where:7}{distance:>3}" + "".join(f"{cell:>18}" for cell in cells))
    told += [f"damping {s['damping']}, M = {s['particles']}: {s['kept']:.2f} of the variance" for s in found["spreads"]]
    return "\n".join(told)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bmtpt_ds.experiments.conflict", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/conflict"), help="folder (default: %(default)s)")
    folder = parser.parse_args().out
    try:
        check_writable(folder, "--out")
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    found = measure()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "conflict.json", (json.dumps(found, indent=1) + "\n").encode())
    plot_conflict(folder / "conflict.png", found)
    print(lines(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
