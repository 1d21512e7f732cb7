"""Worlds of one, two and four ranks learn the same particles: whatever the process grid, however the backbone is laid
out, and though a run begun in one world goes on in another. And a step sends no more than it must."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from bmtpt_ds.config import SourceConfig
from bmtpt_ds.errors import UserError
from bmtpt_ds.stage_inputs import particle_ranks
from tests import launch, toy

STEPS, PARTICLES = 5, 4
SIZE = PARTICLES * 5 * 32  # numbers in the particles
# name: ranks, particle ranks
GRIDS = {"2x1": (2, 2), "1x2": (2, 1), "2x2": (4, 2), "1x4": (4, 1), "4x1": (4, 4)}
# name: ranks, DeepSpeed JSON
LAYOUTS = {"offload": (2, "zero3_offload"), "hpz, one node": (2, "zero3_hpz"), "hpz, two nodes": (4, "groups of two")}
# name: ranks, particle ranks that a run of two ranks goes on with
ELSEWHERE = {"on 1": (0, 1), "on 4": (4, 1), "on 4 as 2x2": (4, 2)}


class Run(NamedTuple):
    particles: torch.Tensor
    log: list[dict]
    sent: dict[str, int]  # bytes of the tensors that rank 0 put into each kind of collective in the steps


class Folder:
    """Where the runs lie, and how they are started."""

    def __init__(self, path: Path, recipe: str):
        self.path = path
        (path / "recipe.yaml").write_text(recipe)
        zero3 = json.loads((launch.ROOT / "ds_configs/zero3_cpu.json").read_text())
        zero3["zero_optimization"]["zero_hpz_partition_size"] = 2
        (path / "groups of two.json").write_text(json.dumps(zero3))

    def command(self, name: str, *settings: str, json_name: str | None = "zero3_cpu", more: tuple = ()) -> list:
        chosen = [part for setting in settings for part in ("--set", setting)]
        own = self.path / f"{json_name}.json"
        layout = ["--deepspeed_config", own if own.exists() else json_name] if json_name else []
        return ["source", "--config", self.path / "recipe.yaml", *chosen, "--run-dir", self.path / name, *layout, *more]

    def run(self, commands: dict[str, list], ranks: int) -> dict[str, Run]:
        seen = launch.run_commands(list(commands.values()), self.path / f"job{ranks}", ranks=ranks)
        assert [s["status"] for s in seen] == [0] * len(commands)
        return {name: self.read(name, s["sent"]) for name, s in zip(commands, seen, strict=True)}

    def read(self, name: str, sent: dict[str, int]) -> Run:
        particles = load_file(self.path / name / "particles.safetensors")["particles"]
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return Run(particles, [json.loads(line) for line in lines], sent)

    def begin(self, name: str, begun: str) -> None:
        """A copy of a finished run as it was after half of its steps."""
        shutil.copytree(self.path / begun, self.path / name)
        for file in ("results.json", "particles.safetensors", f"checkpoints/step-{2 * STEPS:08d}.safetensors"):
            (self.path / name / file).unlink()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, untied_model: Path, rows: Path) -> dict[str, Run]:
    recipe = toy.recipe_text(untied_model, rows).replace("particles: 3", f"particles: {PARTICLES}")
    folder = Folder(tmp_path_factory.mktemp("worlds"), recipe.replace("check_replicas: 2", "check_replicas: 0"))
    short, long = f"source.steps={STEPS}", (f"source.steps={2 * STEPS}", f"run.save_every={STEPS}")

    def commands(world: int) -> dict[str, list]:
        grids = {
            name: folder.command(name, short, f"source.particle_ranks={blocks}")
            for name, (ranks, blocks) in GRIDS.items()
            if ranks == world
        }
        layouts = {
            name: folder.command(name, short, json_name=json_name)
            for name, (ranks, json_name) in LAYOUTS.items()
            if ranks == world
        }
        resumed = {}
        for name, (ranks, blocks) in ELSEWHERE.items():
            if ranks == world:
                settings = (*long, f"source.particle_ranks={blocks}")
                json_name = "zero3_cpu" if ranks else None
                resumed[name] = folder.command(name, *settings, json_name=json_name, more=("--resume",))
        return grids | layouts | resumed

    own = (short, "source.particle_rows=own")
    # of micro-batches so small that the blocks, each by itself, would need different numbers of them
    grid = ("source.particle_ranks=2", "run.max_tokens_per_micro_batch=40")
    blocks = {"own rows, 2x1": folder.command("own rows, 2x1", *own, *grid)}
    found = folder.run({"begun": folder.command("begun", *long), **commands(2), **blocks}, 2)
    for name in ELSEWHERE:
        folder.begin(name, "begun")
    alone = {"1x1": (short,), "own rows": own}
    commands_alone = {name: folder.command(name, *settings, json_name=None) for name, settings in alone.items()}
    found |= folder.run({**commands_alone, **commands(0)}, 0)
    return found | folder.run(commands(4), 4)


def difference(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


@pytest.mark.parametrize("name", [*GRIDS, *LAYOUTS])
def test_particles_are_those_of_one_process(runs: dict[str, Run], name: str) -> None:
    assert difference(runs[name].particles, runs["1x1"].particles) < 1e-5
    losses = [[line["losses"] for line in run.log] for run in (runs["1x1"], runs[name])]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)


def test_blocks_of_particles_with_rows_of_their_own(runs: dict[str, Run]) -> None:
    assert difference(runs["own rows, 2x1"].particles, runs["own rows"].particles) < 1e-5
    assert difference(runs["own rows"].particles, runs["1x1"].particles) > 1e-3


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_run_goes_on_with_other_ranks(runs: dict[str, Run], name: str) -> None:
    assert [line["step"] for line in runs[name].log] == [line["step"] for line in runs["begun"].log]
    assert difference(runs[name].particles, runs["begun"].particles) < 1e-5
    assert difference(runs["1x2"].particles, runs["begun"].particles) > 1e-3  # half as many steps


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
    source = SourceConfig(particle_ranks=asked, particles=particles)
    if possible is None:
        assert particle_ranks(source, world) == (1 if asked == "auto" else asked)
        return
    with pytest.raises(UserError, match=rf"source\.particle_ranks: {asked} must divide .*; give {possible}$"):
        particle_ranks(source, world)
