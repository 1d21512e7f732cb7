"""The source stage: a step is Algorithm 1's, steps with non-finite scores are skipped and in the end stop the run."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from bmtpt_ds.checkpoint import Checkpoints, Stored, read_tensors
from bmtpt_ds.config import Recipe, RunConfig
from bmtpt_ds.data.splits import load_task
from bmtpt_ds.data.tokens import RowEncoder, collate
from bmtpt_ds.errors import UserError
from bmtpt_ds.losses import GradientPass, Prompts
from bmtpt_ds.phases import Phases
from bmtpt_ds.runlog import RunLog
from bmtpt_ds.session import Session
from bmtpt_ds.source import Posterior, TaskSplits, draw_rows, learn_posterior, svgd_backend
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.svgd import svgd_direction
from bmtpt_ds.tasks import get_task
from tests.one_step import gradient_of_rows


def recipe_with(**source) -> Recipe:
    values = {"tasks": ["sst2", "cola"], "particles": 3, "rows_per_task": 2, "steps": 2, "warmup_steps": 0, **source}
    return Recipe(model={"max_source_length": 32}, prompt={"length": 5}, source=values, run={"log_every": 1})


@pytest.fixture
def tasks(rows: Path) -> list[TaskSplits]:
    return [TaskSplits(get_task(name), load_task(get_task(name), root=str(rows))) for name in ("sst2", "cola")]


def learn(
    loaded, encoder: RowEncoder, recipe: Recipe, tasks: list[TaskSplits], folder: Path, begun: Stored | None = None
) -> Posterior:
    folder.mkdir(exist_ok=True)
    session = Session(recipe, loaded, encoder, StopSignal())
    posterior = Posterior.start(session.initial_prompts(recipe.source.particles), recipe.source.optimizer)
    if begun:
        posterior.restore(begun.tensors, begun.state)
    steps, start = recipe.source.steps, posterior.step
    log = RunLog(folder, loaded.ds, ranks=loaded.ranks, start=start, validated=0, steps=steps, title="source")
    learn_posterior(session, tasks, posterior, log, Checkpoints(folder / "checkpoints", 2))
    return posterior


@pytest.mark.parametrize("scale, backend", [(1.0, "auto"), (7.0, "auto"), (7.0, "triton")])
def test_first_step_is_algorithm_1(loaded, encoder, tasks, tmp_path: Path, scale: float, backend: str) -> None:
    """theta + lr * phi, phi of the scores - scale * grad of the mean over all rows, each row alone in its batch."""
    svgd = {"damping": "matched", "backend": backend}
    recipe = recipe_with(optimizer="sgd", lr=3.0, steps=1, likelihood_scale=scale, svgd=svgd)
    before = Session(recipe, loaded, encoder, StopSignal()).initial_prompts(3)
    theta = before.clone().requires_grad_()
    drawn = draw_rows(recipe.source, 0, 1, tasks, encoder).rows
    losses = [
        loaded.backbone.row_losses(particle[None], collate([[row]], 0).on(torch.device("cpu")))[0] / 4
        for particle in theta
        for row in drawn
    ]
    torch.stack(losses).sum().backward()
    phi = svgd_direction(before.flatten(1).double(), -scale * theta.grad.flatten(1).double(), damping="matched")
    after = learn(loaded, encoder, recipe, tasks, tmp_path).particles
    torch.testing.assert_close((after - before).flatten(1).double(), 3.0 * phi.direction, rtol=1e-4, atol=1e-5)


def test_a_run_by_the_kernels_is_a_run_by_the_reference(loaded, encoder, tasks, tmp_path: Path) -> None:
    ends = []
    for backend in ("reference", "triton"):
        recipe = recipe_with(steps=4, clip_norm=1.0, svgd={"backend": backend})
        posterior = learn(loaded, encoder, recipe, tasks, tmp_path / backend)
        lines = [json.loads(line) for line in (tmp_path / backend / "metrics.jsonl").read_text().splitlines()]
        ends.append((posterior, [line for line in lines if "loss" in line]))
    (right, expected), (found, logged) = ends
    torch.testing.assert_close(found.particles, right.particles, rtol=1e-3, atol=1e-3)
    assert len(logged) == len(expected) == 4
    for one, two in zip(logged, expected, strict=True):
        for name in ("loss", "bandwidth", "damping", "kernel_mean", "drive_norm", "repulsion_norm", "skipped"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name


def test_a_line_tells_the_mean_of_the_steps_since_the_one_before_whatever_was_asked_for_then(
    loaded, encoder, tasks, tmp_path: Path
) -> None:
    """Begun with a line at step 1 and none until the end, it goes on from step 4 with a line every third step."""

    def losses(folder: Path) -> dict[int, float]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines}

    def recipe(log_every: int) -> Recipe:
        return recipe_with(steps=8).model_copy(update={"run": RunConfig(log_every=log_every, save_every=4, keep=2)})

    learn(loaded, encoder, recipe(1), tasks, tmp_path / "each")
    learn(loaded, encoder, recipe(100), tasks, tmp_path / "begun")
    begun = read_tensors(tmp_path / "begun/checkpoints/step-00000004.safetensors")
    learn(loaded, encoder, recipe(3), tasks, tmp_path / "begun", begun)
    each, found = losses(tmp_path / "each"), losses(tmp_path / "begun")
    means = {1: each[1], 6: fmean(each[step] for step in range(2, 7)), 8: (each[7] + each[8]) / 2}
    assert found == pytest.approx(means, rel=1e-5)


def test_it_goes_on_to_the_bit_whatever_memory_is_free(loaded, encoder, tasks, tmp_path: Path, monkeypatch) -> None:
    """In micro-batches as large as before: others would round otherwise. A recipe that names a size has its way."""

    def recipe(max_tokens: int | str) -> Recipe:
        run = RunConfig(save_every=2, keep=9, max_tokens_per_micro_batch=max_tokens)
        return recipe_with(steps=4).model_copy(update={"run": run})

    def free(size: float) -> None:
        monkeypatch.setattr(type(loaded.ranks), "free_memory", lambda _: int(size))

    free(1e9)
    whole = learn(loaded, encoder, recipe("auto"), tasks, tmp_path / "whole")
    begun = read_tensors(tmp_path / "whole/checkpoints/step-00000002.safetensors")
    free(3e5)
    found = learn(loaded, encoder, recipe("auto"), tasks, tmp_path / "goes on", begun)
    assert found.planned == whole.planned
    assert torch.equal(found.particles, whole.particles)
    assert learn(loaded, encoder, recipe(50), tasks, tmp_path / "asked", begun).planned == [1, 50]
    before = {**begun.state, "planned": [2, 10**6]}  # on two ranks
    elsewhere = learn(loaded, encoder, recipe("auto"), tasks, tmp_path / "one", replace(begun, state=before))
    assert elsewhere.planned[1] < whole.planned[1]
    assert not torch.equal(elsewhere.particles, whole.particles)


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    source = recipe_with(svgd={"backend": "triton"}).source
    with pytest.raises(UserError, match=r"^source.svgd.backend: .* cpu is not an NVIDIA GPU"):
        svgd_backend(source, torch.zeros(3, 5, 32))


def test_a_step_draws_kappa_tasks_and_the_same_rows_for_the_same_seed(encoder, tasks) -> None:
    both, one = recipe_with().source, recipe_with(tasks_per_step=1).source
    assert len(draw_rows(both, 0, 1, tasks, encoder).rows) == 4
    assert len(draw_rows(one, 0, 1, tasks, encoder).rows) == 2
    assert draw_rows(both, 0, 5, tasks, encoder) == draw_rows(both, 0, 5, tasks, encoder)
    assert draw_rows(both, 0, 5, tasks, encoder) != draw_rows(both, 1, 5, tasks, encoder)


def test_particles_with_rows_of_their_own(loaded, encoder, tasks) -> None:
    """Each particle's gradient is that of its own kappa * R rows alone; the first reads what all would share."""
    shared, own = (draw_rows(recipe_with(particle_rows=w).source, 0, 1, tasks, encoder) for w in ("shared", "own"))
    of_particle = [[row for row, p in zip(own.rows, own.prompt_of, strict=True) if p == m] for m in range(3)]
    assert of_particle[0] == shared.rows
    assert [len(rows) for rows in of_particle] == [4, 4, 4]
    assert of_particle[0] != of_particle[1] != of_particle[2] != of_particle[0]
    particles = Session(recipe_with(), loaded, encoder, StopSignal()).initial_prompts(3)
    gradient_pass = GradientPass(loaded, encoder.pad_id, 10_000, 0, Phases(torch.device("cpu")))
    found = gradient_pass(Prompts(particles), gradient_pass.prepare(own, 3, 5), 1, StopSignal())
    for m, rows in enumerate(of_particle):
        alone = gradient_of_rows(gradient_pass, particles[m : m + 1], rows)
        torch.testing.assert_close(found.gradient[m], alone.gradient[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.losses[m], alone.losses[0])


class Poisoned:
    """A backbone whose losses are not finite from some call on."""

    def __init__(self, backbone, after: int):
        self._backbone, self._left = backbone, after

    def __getattr__(self, name: str):
        return getattr(self._backbone, name)

    def row_losses(self, *arguments: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        return self._backbone.row_losses(*arguments) * (1.0 if self._left >= 0 else torch.nan)


def test_non_finite_scores_are_skipped_then_stop_the_run(loaded, encoder, tasks, tmp_path: Path) -> None:
    poisoned = replace(loaded, backbone=Poisoned(loaded.backbone, after=2))
    with pytest.raises(UserError, match=r"step 6: scores were not finite for 4 steps in a row.*(sst2|cola)"):
        learn(poisoned, encoder, recipe_with(steps=20, max_skipped=3), tasks, tmp_path / "stopped")


def test_skipped_steps_move_nothing(loaded, encoder, tasks, tmp_path: Path) -> None:
    """Two sound steps, then four skipped ones, end where two steps of the same schedule end."""
    recipe = recipe_with(steps=6, schedule="constant")
    poisoned = replace(loaded, backbone=Poisoned(loaded.backbone, after=2))
    skipped = learn(poisoned, encoder, recipe, tasks, tmp_path / "skipped")
    sound = learn(loaded, encoder, recipe_with(steps=2, schedule="constant"), tasks, tmp_path / "sound")
    assert torch.equal(skipped.particles, sound.particles)
    assert skipped.state["skipped"].item() == 4
    assert skipped.step == 6
    assert '"loss": null' in (tmp_path / "skipped" / "metrics.jsonl").read_text()  # JSON has no nan
