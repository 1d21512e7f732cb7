"""The steps of both stages, timed: `SourceSteps` and `TargetSteps` as a run makes them.

Nothing waits inside a measured step: a GPU's phases are timed by its own events.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import NamedTuple

import torch

from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.experiments.profiling.bench import Bench
from bmtpt_ds.experiments.wire import particle_traffic
from bmtpt_ds.losses import GradientPass, Prompts
from bmtpt_ds.model.flops import Flops, row_flops
from bmtpt_ds.parallel import Grid, Ranks
from bmtpt_ds.parallel.measure import gathered_weights, peak_memory, reset_peak_memory, wait_for
from bmtpt_ds.phases import Phases
from bmtpt_ds.session import Session
from bmtpt_ds.source import Posterior, SourceSteps, draw_rows, svgd_backend
from bmtpt_ds.stage_inputs import particle_ranks
from bmtpt_ds.target import Prior, TargetSteps
from bmtpt_ds.target import draw_rows as draw_target_rows


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    stages: Sequence[str] = ("source", "target")
    steps: int = 20  # measured
    warmup: int = 3  # steps before, not measured
    trace: Path | None = None  # of two more steps of each stage, as Chrome and Perfetto read it


def source_stage(bench: Bench, posterior: Posterior, peak: float, asked: Asked) -> dict:
    """Seconds by phase, work, memory and traffic of the source stage's steps; `posterior` is moved.

    Args:
        peak: operations a second that a rank's device reaches at best.
    """
    session, recipe, tasks = bench.session, bench.session.recipe, bench.sources
    source = recipe.source.model_copy(update={"steps": max(recipe.source.steps, asked.warmup + asked.steps + 3)})
    grid = Grid(session.ranks, particle_ranks(source, session.ranks.world))
    phases, (count, length, _) = Phases(session.ranks.device), posterior.particles.shape
    gradient_of = GradientPass.of(session, [task for task, _ in tasks], phases, grid)
    backend = svgd_backend(source, posterior.particles)

    def draw(step: int) -> StepRows:
        return draw_rows(source, recipe.run.seed, step, tasks, session.encoder)

    def rehearse(step: int) -> None:
        work = gradient_of.prepare(draw(step), count, length)
        gradient_of(Prompts(posterior.particles), work, step, session.stop)

    rehearsal = Rehearsal(gradient_of, rehearse)
    with SourceSteps(source, session.model, gradient_of, backend, phases, draw, session.stop, length) as next_step:
        measured = _measure(session.ranks, lambda: next_step(posterior), phases, asked, rehearsal, "source")
    of_steps = [_work(session, draw(step), count, length) for step in measured.steps(asked)]
    passes = len(gradient_of.prepare(draw(1), count, length).passes)
    numbers = posterior.particles.numel()
    traffic = particle_traffic(numbers, numbers, grid.data_ranks, grid.particle_ranks)
    return {
        "tasks": [task.name for task, _ in tasks],
        "rows": source.kappa * source.rows_per_task,
        "svgd": backend.describe(posterior.particles.flatten(1)),
        **measured.result(session, of_steps, passes, traffic, peak),
    }


def target_stage(bench: Bench, particles: torch.Tensor, peak: float, asked: Asked) -> dict:
    """As `source_stage`, of the target stage's, from the mean of particles [M, L, H]."""
    session, runs, target = bench.session, bench.runs, bench.session.recipe.target
    target = target.model_copy(update={"steps": max(target.steps, asked.warmup + asked.steps + 3)})
    prior = Prior(target.prior, particles.expand(len(runs), *particles.shape), target.sigma)
    adaptation = Adaptation(TunedPrompt.begin(prior.centre, len(runs[0].tasks)), target)
    phases = Phases(session.ranks.device)
    gradient_of = GradientPass.of(session, [task for run in runs for task, _ in run.tasks], phases)

    def draw(step: int) -> tuple[StepRows, torch.Tensor]:
        return draw_target_rows(runs, step, session.encoder)

    length, hidden = particles.shape[-2:]

    def rehearse(step: int) -> None:
        rows, counts = draw(step)
        work = gradient_of.prepare(rows, counts.numel(), length)
        gradient_of(adaptation.tuned.through(), work, step, session.stop)

    rehearsal = Rehearsal(gradient_of, rehearse)
    with TargetSteps(target, session.model, gradient_of, prior, phases, draw, session.stop, length) as next_step:
        measured = _measure(session.ranks, lambda: next_step(adaptation), phases, asked, rehearsal, "target")
    rows, counts = draw(1)
    of_steps = [_work(session, draw(step)[0], counts.numel(), length) for step in measured.steps(asked)]
    passes = len(gradient_of.prepare(rows, counts.numel(), length).passes)
    moved = len(runs) * adaptation.tuned.parameters()
    traffic = particle_traffic(counts.numel() * length * hidden, moved, session.ranks.world, 1)
    names = list(dict.fromkeys(task.name for run in runs for task, _ in run.tasks))
    return {
        "tasks": names,
        "rows": len(rows.rows),
        "runs": len(runs),
        "prior": target.prior,
        **measured.result(session, of_steps, passes, traffic, peak),
    }


def smallest_pass(session: Session) -> dict[str, float]:
    """Seconds of a forward and backward pass over a single short row on each rank: what a pass costs however small it
    is, the gathering of weights included; its operations."""
    ranks, model, phases = session.ranks, session.model, Phases(session.ranks.device)
    row, prompt = TokenRow([3, 4, 5, 1], [3, 1]), session.initial_prompts(1)[:, :1]
    gradient_of = GradientPass(model, session.encoder.pad_id, 10**9, 0, phases)
    work = gradient_of.prepare(StepRows.evenly([row] * ranks.world), 1, 1)
    for step in range(1, 11):
        if step == 4:
            phases.take_each()
        gradient_of(Prompts(prompt), work, step, session.stop)
        phases.count_step()
    seconds = median(step["forward"] + step["backward"] for step in phases.take_each())
    checkpointing, on_cpu = model.backbone.checkpoints_activations, ranks.device.type == "cpu"
    flops = row_flops(model.architecture, 5, 2, checkpointing=checkpointing, on_cpu=on_cpu)
    return {"seconds": ranks.from_first(seconds), "flops": flops.total}


class Rehearsal(NamedTuple):
    """The gradients of steps to come: where passes are captured as CUDA graphs, a long run meets few new sizes, and its
    steps are what is to be measured."""

    gradient_of: GradientPass
    rehearse: Callable[[int], object]  # a step's gradient

    def __call__(self, steps: Sequence[int], device: torch.device) -> list[float]:
        """Seconds of those in which passes were captured; where none are nothing is rehearsed.

        Twice: a pass larger than all before has the smaller ones captured anew.
        """
        seconds = []
        for step in [*steps, *steps] if self.gradient_of.captures else ():
            before, begun = self.gradient_of.captured, time.perf_counter()
            self.rehearse(step)
            wait_for(device)
            if self.gradient_of.captured > before:
                seconds.append(time.perf_counter() - begun)
        return seconds


@dataclass(frozen=True)
class _Measured:
    """A stage's steps, one after another."""

    captures: list[float]  # seconds of steps in which passes were captured
    seconds: list[dict[str, float]]  # of each step, by phase
    memory: int  # the peak of the fullest rank
    weights: list[int]  # what a rank sends in each gather of weights of one step

    def steps(self, asked: Asked) -> range:
        """The numbers of the measured steps."""
        return range(asked.warmup + 1, asked.warmup + asked.steps + 1)

    def result(
        self,
        session: Session,
        work: Sequence[tuple[Flops, int]],
        passes: int,
        traffic: dict[str, int],
        peak: float,
    ) -> dict:
        """
        Args:
            work: of each measured step, over all ranks: operations, tokens.
            passes: micro-batches of a rank in a step.
            traffic: of the particles, bytes that a rank sends.
        """
        names = dict.fromkeys(name for step in self.seconds for name in step)
        for step in self.seconds:
            step["other"] = step["step"] - sum(value for name, value in step.items() if name != "step")
        spent = {name: _spread([step.get(name, 0.0) for step in self.seconds]) for name in [*names, "other"]}
        whole, world = sum(step["step"] for step in self.seconds), session.ranks.world
        model, total = (sum(getattr(flops, kind) for flops, _ in work) / whole / world for kind in ("model", "total"))
        ratio = {}
        if "svgd" in spent:
            ratio = {"svgd_over_backward": spent["svgd"]["median"] / spent["backward"]["median"]}
        if self.captures:
            ratio["capture_seconds"] = median(self.captures)
        return {
            "seconds": spent,
            **ratio,
            "tokens": sum(tokens for _, tokens in work) / len(work),
            "passes": passes,
            "flops": sum(flops.model for flops, _ in work) / len(work),
            "flops_computed": sum(flops.total for flops, _ in work) / len(work),
            "model_flops_per_second": model,
            "computed_flops_per_second": total,
            "share_of_peak": model / peak,
            "peak_memory": self.memory,
            "wire": {"weights": sum(self.weights), "gathers": len(self.weights), **traffic},
        }


def _measure(
    ranks: Ranks, step: Callable[[], object], phases: Phases, asked: Asked, rehearsal: Rehearsal, stage: str
) -> _Measured:
    reset_peak_memory(ranks.device)  # before all: what a captured pass takes is seen when it is captured
    captures = rehearsal(range(1, asked.warmup + asked.steps + 4), ranks.device)
    for _ in range(asked.warmup):
        step()
    phases.take_each()
    ranks.gather(None)  # all begin together
    for _ in range(asked.steps):
        step()
    seconds = phases.take_each()
    memory = max(ranks.gather(peak_memory(ranks.device)))
    with gathered_weights() as weights:
        step()
    if asked.trace:
        _trace(asked.trace.with_stem(f"{asked.trace.stem}-{stage}"), step, ranks)
    # rank 0's clock; ranks that wait for the slowest one show it in `gather`
    return _Measured(captures, ranks.from_first(seconds), memory, weights)


def _trace(file: Path, step: Callable[[], object], ranks: Ranks) -> None:
    """Two steps as rank 0 makes them, with a range for each phase."""
    with torch.profiler.profile() if ranks.first else nullcontext() as profiler:
        for _ in range(2):
            step()
    if ranks.first:
        profiler.export_chrome_trace(str(file))


def _work(session: Session, step: StepRows, prompts: int, length: int) -> tuple[Flops, int]:
    """Operations and tokens of a step's rows, each read through so many prompts or through one of its own."""
    reads = prompts if step.prompt_of is None else 1
    flops, tokens, model = Flops(0, 0, 0), 0, session.model
    for row in step.rows:
        source, target = length + len(row.source), len(row.target)
        own = row_flops(
            model.architecture,
            source,
            target,
            checkpointing=model.backbone.checkpoints_activations,
            on_cpu=session.ranks.device.type == "cpu",
        )
        flops, tokens = flops.plus(own), tokens + source + target
    return Flops(*(reads * count for count in flops)), reads * tokens


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median, the borders of the middle 80%, and the mean: means of phases add up to the step's."""
    cuts = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": median(values), "low": cuts[0], "high": cuts[-1], "mean": fmean(values)}
