"""Stage 1: particles that approximate the posterior of the source tasks (Algorithm 1, upper half).

Symbols: M particles, L prompt length, H hidden size, D = L * H, K source tasks, kappa of them a step, R rows of each.

A step draws kappa tasks and R rows of each, sees every row through every particle, adds up the gradients over the
ranks, and moves the particles by one SVGD step, on rank 0, which then tells the others.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bmtpt_ds.checkpoint import Checkpoints
from bmtpt_ds.config import SourceConfig
from bmtpt_ds.data.ahead import Ahead
from bmtpt_ds.data.order import drawn_rows, tasks_of_step
from bmtpt_ds.data.splits import TaskSplits
from bmtpt_ds.data.tokens import RowEncoder, TokenRow
from bmtpt_ds.data.work import StepRows, StepWork
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import EncodedRows, score_prompts
from bmtpt_ds.flags import LateFlags
from bmtpt_ds.losses import GradientPass, Prompts, StepGradient
from bmtpt_ds.parallel import Grid, Ranks, Sharded
from bmtpt_ds.phases import Phases
from bmtpt_ds.results import beside_majority
from bmtpt_ds.runlog import RunLog, is_log_step
from bmtpt_ds.schedule import learning_rate_factor
from bmtpt_ds.session import Session
from bmtpt_ds.stage_inputs import particle_ranks
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.svgd import Backend, Diagnostics, choose_backend, init_state, svgd_step_


@dataclass
class Posterior:
    """Where the source stage stands: all that a checkpoint needs."""

    particles: torch.Tensor  # [M, L, H] float32, bit for bit the same on all ranks
    state: dict[str, torch.Tensor]  # of the optimizer; rank 0's counts
    losses: torch.Tensor  # [M], summed since the last line of the log
    summed: int = 0  # steps whose losses these are
    step: int = 0  # steps done
    validated: int = 0  # the last step whose validation is in the log
    skipped_in_a_row: int = 0
    planned: Sequence[int] = ()  # GradientPass.planned of its steps

    @classmethod
    def start(cls, particles: torch.Tensor, optimizer: str) -> "Posterior":
        return cls(particles, init_state(particles.flatten(1), optimizer), particles.new_zeros(len(particles)))

    def describe(self) -> str:
        """In a few words for a person."""
        count, length, hidden = self.particles.shape
        return f"{count} particle{'s' * (count > 1)} of {length} x {hidden}"

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {f"optimizer.{name}": value for name, value in self.state.items()}
        return {"particles": self.particles, "losses": self.losses, **moments}

    def counters(self) -> dict[str, int | list[int]]:
        counts = {"summed": self.summed, "validated": self.validated, "skipped_in_a_row": self.skipped_in_a_row}
        return {**counts, "planned": list(self.planned)}

    def restore(self, tensors: dict[str, torch.Tensor], saved: dict) -> None:
        """Takes over what `tensors` and `counters` gave, in place."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.step, self.summed, self.planned = saved["step"], saved.get("summed", 0), saved.get("planned", [])
        if not self.summed:  # an older checkpoint does not say of how many steps they are
            self.losses.zero_()
        self.validated, self.skipped_in_a_row = saved["validated"], saved["skipped_in_a_row"]


def svgd_backend(source: SourceConfig, particles: torch.Tensor) -> Backend:
    """What is to compute the SVGD steps of these particles [M, L, H].

    Raises:
        UserError: the recipe wants one that cannot run here.
    """
    try:
        return choose_backend(particles.flatten(1), source.svgd.backend)
    except ValueError as error:
        raise UserError(f"source.svgd.backend: {error}") from None


def learn_posterior(
    session: Session, tasks: Sequence[TaskSplits], posterior: Posterior, log: RunLog, checkpoints: Checkpoints
) -> None:
    """Runs the source stage from where `posterior` stands to its last step; `posterior` is changed in place.

    Args:
        tasks: K of them, with rows.

    Raises:
        Stopped: a signal came; the checkpoint of the last step is written.
        UserError: scores were not finite for more than `source.max_skipped` steps in a row.
    """
    source, run, ranks, phases = session.recipe.source, session.recipe.run, session.ranks, log.phases
    grid = Grid(ranks, particle_ranks(source, ranks.world))
    gradient_of = GradientPass.of(session, [task for task, _ in tasks], phases, grid, posterior.planned)
    posterior.planned = gradient_of.planned
    about, flags = session.identity(), LateFlags(ranks.device)
    backend = svgd_backend(source, posterior.particles)
    validation = [
        EncodedRows.of(session.encoder, task, splits.validation)
        for task, splits in (tasks if source.eval_every else ())
    ]
    log.say(f"SVGD: {backend.describe(posterior.particles.flatten(1))}")

    def draw(step: int) -> StepRows:
        return draw_rows(source, run.seed, step, tasks, session.encoder)

    with SourceSteps(
        source, session.model, gradient_of, backend, phases, draw, session.stop, posterior.particles.shape[1]
    ) as next_step:
        while True:
            if _due(source.eval_every, posterior.step) and posterior.validated < posterior.step:
                with phases.paused():
                    validate(session, validation, posterior, log)
            if posterior.step == source.steps:
                return
            gradient, diagnostics = next_step(posterior)
            step = posterior.step
            logged = is_log_step(step, run.log_every, source.steps)
            # saved before a validation too: one that a signal breaks off is done again on resume
            saved = step % run.save_every == 0 or step == source.steps or _due(source.eval_every, step)
            stop = _heed(flags.read(step, gradient.flags, now=logged or saved), source, posterior, run.seed, tasks)
            if _due(run.check_replicas, step) and not ranks.same_everywhere(posterior.particles):
                raise RuntimeError(f"step {step}: the ranks' particles differ")
            if logged:
                log.line(metrics_of(source, posterior, gradient, diagnostics, phases))
                posterior.losses.zero_()
                posterior.summed = 0
            log.advance(step)
            if saved or stop:  # all ranks go on when it is there: a launcher ends them all as soon as one has left
                state = about | posterior.counters()
                ranks.first_does(partial(checkpoints.save, step, posterior.tensors(), state))
            if stop:
                raise session.stop.stopped()


class SourceSteps:
    """Makes the steps of the source stage: rows, gradients, SVGD. A context: inside, the next step's rows are made
    while a step runs."""

    def __init__(
        self,
        source: SourceConfig,
        model: Sharded,
        gradient_of: GradientPass,
        backend: Backend,
        phases: Phases,
        draw: Callable[[int], StepRows],
        stop: StopSignal,
        length: int,
    ):
        """
        Args:
            draw: the rows of a step, the same on all ranks; called in a thread.
            length: L.
        """
        self._source, self._model, self._gradient_of, self._backend = source, model, gradient_of, backend
        self._phases, self._stop = phases, stop

        def work_of(step: int) -> StepWork:
            return gradient_of.prepare(draw(step), source.particles, length)

        self._ahead = Ahead(work_of, source.steps)

    def __enter__(self) -> "SourceSteps":
        self._ahead.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(*error)

    def __call__(self, posterior: Posterior) -> tuple[StepGradient, Diagnostics | None]:
        """Takes the posterior one step on; what the step was made of."""
        step, backbone = posterior.step + 1, self._model.backbone
        with self._phases("data"):
            work = self._ahead.take(step)
        backbone.train(backbone.train_while_tuning)
        gradient = self._gradient_of(Prompts(posterior.particles), work, step, self._stop)
        diagnostics = svgd_step(self._source, self._backend, self._model.ranks, posterior, gradient, step, self._phases)
        posterior.step = step
        self._phases.count_step()
        return gradient, diagnostics


def draw_rows(source: SourceConfig, seed: int, step: int, tasks: Sequence[TaskSplits], encoder: RowEncoder) -> StepRows:
    """The kappa * R rows that a particle reads in a step, a pure function of seed and step (section 4.2.1: tasks
    without replacement)."""
    sizes = {task.name: len(splits.train) for task, splits in tasks}

    def of_particle(particle: int) -> list[TokenRow]:
        places = drawn_rows(seed, step, sizes, source.kappa, source.rows_per_task, particle)
        return [encoder.encode(tasks[k].task, tasks[k].splits.train[i]) for k, i in places]

    drawn = [of_particle(particle) for particle in range(source.draws)]
    return StepRows.of_prompts(drawn) if source.draws > 1 else StepRows.evenly(drawn[0])


def svgd_step(
    source: SourceConfig,
    backend: Backend,
    ranks: Ranks,
    posterior: Posterior,
    gradient: StepGradient,
    step: int,
    phases: Phases,
) -> Diagnostics | None:
    """Moves the particles on rank 0, tells the others; what the step was made of, on rank 0."""
    diagnostics = None
    with phases("svgd"):
        if ranks.first:
            diagnostics = svgd_step_(
                posterior.particles.view(len(posterior.particles), -1),
                gradient.gradient.flatten(1),
                posterior.state,
                optimizer=source.optimizer,
                lr=learning_rate(source, step),
                betas=source.betas,
                eps=source.eps,
                weight_decay=source.weight_decay,
                clip_norm=source.clip_norm,
                score_scale=-source.likelihood_scale,  # score = grad log p = - scale * grad loss
                bandwidth=source.svgd.bandwidth,
                damping=source.svgd.damping,
                repulsion_scale=source.svgd.repulsion_scale,
                backend=backend,
            )
    with phases("broadcast"):
        ranks.broadcast_(posterior.particles)
    posterior.losses += gradient.losses
    posterior.summed += 1
    return diagnostics


def learning_rate(source: SourceConfig, step: int) -> float:
    return source.lr * learning_rate_factor(
        step, steps=source.steps, warmup_steps=source.warmup_steps, schedule=source.schedule
    )


def metrics_of(
    source: SourceConfig,
    posterior: Posterior,
    gradient: StepGradient,
    diagnostics: Diagnostics | None,
    phases: Phases,
) -> dict:
    """The line of metrics.jsonl at the posterior's step; {} on ranks other than 0."""
    if diagnostics is None:
        return {}
    step = posterior.step
    losses = posterior.losses / posterior.summed
    values = dict(zip(diagnostics._fields, torch.stack([d.double() for d in diagnostics]).tolist(), strict=True))
    return {
        "step": step,
        "loss": losses.mean().item(),
        "losses": losses.tolist(),
        **values,
        "lr": learning_rate(source, step),
        "imbalance": round(gradient.imbalance, 4),
        **phases.take(),
    }


def validate(session: Session, rows: Sequence[EncodedRows], posterior: Posterior, log: RunLog) -> None:
    """Scores the particles' mean on the source tasks' validation rows and logs a line."""
    centre = posterior.particles.mean(dim=0)
    scored = score_prompts(session, [(centre, of_task) for of_task in rows])
    scores = {s.rows.task.name: s.score for s in scored}
    posterior.validated = posterior.step
    log.line({"step": posterior.step, **beside_majority(scores)})


def _heed(
    flags: Iterable[tuple[int, bool, bool]],
    source: SourceConfig,
    posterior: Posterior,
    seed: int,
    tasks: Sequence[TaskSplits],
) -> bool:
    """Whether to stop. Ends a run whose scores stay non-finite; a few such steps only leave the particles as they were.

    Args:
        flags: step, whether its scores were finite, whether somebody wants to stop.
    """
    stop = False
    for step, finite, wished in flags:
        stop |= wished
        posterior.skipped_in_a_row = 0 if finite else posterior.skipped_in_a_row + 1
        if posterior.skipped_in_a_row > source.max_skipped:
            drawn = {
                k
                for particle in range(source.draws)
                for k in tasks_of_step(seed, step, len(tasks), source.kappa, particle)
            }
            names = ", ".join(tasks[k].task.name for k in sorted(drawn))
            raise UserError(
                f"step {step}: scores were not finite for {posterior.skipped_in_a_row} steps in a row "
                f"(last with rows of {names}); lower source.lr or set source.clip_norm"
            )
    return stop


def _due(every: int | None, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0
