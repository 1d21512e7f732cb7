"""Process grids: particle ranks x data ranks make the same particles, and send no more than they must."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from bmtpt_ds.errors import UserError
from bmtpt_ds.parallel import particle_ranks
from tests import launch, toy

STEPS, PARTICLES = 5, 4
SIZE = PARTICLES * 5 * 32  # numbers in the particles
# name: ranks, particle ranks
GRIDS = {"2x1": (2, 2), "1x2": (2, 1), "2x2": (4, 2), "1x4": (4, 1), "4x1": (4, 4)}


class Run(NamedTuple):
    particles: torch.Tensor
    log: list[dict]
    sent: dict[str, int]  # bytes of the tensors that rank 0 put into each kind of collective in the steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory, untied_model: Path, rows: Path) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("grid")
    recipe = folder / "recipe.yaml"
    recipe.write_text(toy.recipe_text(untied_model, rows).replace("particles: 3", f"particles: {PARTICLES}"))

    def command(name: str, count: int) -> list:
        settings = [f"source.steps={STEPS}", f"source.particle_ranks={count}", "run.check_replicas=0"]
        chosen = [part for setting in settings for part in ("--set", setting)]
        json_name = [] if name == "1x1" else ["--deepspeed_config", "zero3_cpu"]
        return ["source", "--config", recipe, *chosen, "--run-dir", folder / name, *json_name]

    found = {}
    for ranks in (0, 2, 4):
        names = [name for name, (world, _) in GRIDS.items() if world == ranks] if ranks else ["1x1"]
        commands = [command(name, GRIDS.get(name, (1, 1))[1]) for name in names]
        seen = launch.run_commands(commands, folder / f"job{ranks}", ranks=ranks)
        assert [s["status"] for s in seen] == [0] * len(commands)
        for name, s in zip(names, seen, strict=True):
            particles = load_file(folder / name / "particles.safetensors")["particles"]
            log = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            found[name] = Run(particles, log, s["sent"])
    return found


@pytest.mark.parametrize("name", GRIDS)
def test_particles_are_those_of_one_process(runs: dict[str, Run], name: str) -> None:
    right, found = runs["1x1"].particles, runs[name].particles
    assert ((found - right).norm() / right.norm()).item() < 1e-5
    losses = [[line["losses"] for line in run.log] for run in (runs["1x1"], runs[name])]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_a_step_sends_the_particles_gradients_once(runs: dict[str, Run], name: str) -> None:
    """Of the flat buffer a block is added up and the blocks collected; the moved particles are told; nothing else."""
    ranks, blocks = GRIDS[name]
    flat = SIZE // blocks + PARTICLES // blocks + 1  # gradients, losses, the wish to stop
    sent = runs[name].sent
    assert sent["all_reduce"] == STEPS * 4 * flat
    assert sent.get("all_gather", 0) == (STEPS * 4 * flat if blocks > 1 else 0)
    assert sent["broadcast"] == STEPS * 4 * SIZE
    # what that makes on the wire, in a ring
    data_ranks = ranks // blocks
    reduction = 2 * (data_ranks - 1) / data_ranks * flat + (blocks - 1) * flat
    assert reduction <= 2 * SIZE


def test_ranks_have_their_share(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        assert all(1 <= line["imbalance"] < 1.6 for line in run.log), name  # of 16 cells
    assert all(line["imbalance"] == 1 for line in runs["4x1"].log)  # each has a particle, and all rows


@pytest.mark.parametrize(
    ("asked", "particles", "world", "possible"),
    [(2, 5, 4, "1"), (3, 6, 4, "1 or 2"), (4, 4, 2, "1 or 2"), (5, 10, 10, None), ("auto", 5, 64, None)],
)
def test_impossible_grids_name_the_possible_ones(asked, particles: int, world: int, possible: str | None) -> None:
    if possible is None:
        assert particle_ranks(asked, particles, world) == (1 if asked == "auto" else asked)
        return
    with pytest.raises(UserError, match=rf"source\.particle_ranks: {asked} must divide .*; give {possible}$"):
        particle_ranks(asked, particles, world)
