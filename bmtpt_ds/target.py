"""Stage 2: the centre of the posterior adapted to target tasks (Algorithm 1, lower half; Eq. 6).

Symbols: M particles, L prompt length, H hidden size, N target tasks, R runs side by side. theta_bar is the particles'
mean, theta_T a task's prompt W * (a b^T): W [L, H], begun at theta_bar, is shared by the tasks, a [L] and b [H], begun
at ones, are the task's own. All are trained, at two learning rates, on batches of the rows of all tasks.

Runs side by side (several seeds, several tasks one by one) differ in tasks, rows and seed. None sees another: they only
share the passes through the backbone.

The loop trains whatever a method gives it (`adaptation/tuned.py`): here W, a and b; other prompts, attention over
prompts, weights of the backbone; and the source prompts of methods that train each by itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bmtpt_ds.adaptation.prior import Prior
from bmtpt_ds.adaptation.reports import log_losses, validate
from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.checkpoint import Checkpoints
from bmtpt_ds.config import TargetConfig
from bmtpt_ds.data.ahead import Ahead
from bmtpt_ds.data.tokens import RowEncoder, TokenRow, upload
from bmtpt_ds.data.work import StepRows, StepWork
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import EncodedRows
from bmtpt_ds.flags import LateFlags
from bmtpt_ds.losses import GradientPass, StepGradient
from bmtpt_ds.optimizer import adam, clip_factor
from bmtpt_ds.parallel import Ranks, Sharded
from bmtpt_ds.phases import Phases
from bmtpt_ds.runlog import RunLog, is_log_step
from bmtpt_ds.schedule import learning_rate_factor
from bmtpt_ds.session import Session
from bmtpt_ds.stopping import StopSignal

MAX_SKIPPED = 10  # steps in a row with non-finite gradients that stop the run
_RATES = {  # where a recipe has them
    "lr_full": "target.lr_full",
    "lr_low_rank": "target.lr_low_rank",
    "lr_attention": "attempt.lr",
    "lr_weights": "weights.lr",
}


@dataclass(frozen=True)
class Drawn:
    """The rows of a step: those of every run."""

    work: StepWork
    counts: torch.Tensor  # [R, N] on the host, rows of each task


def adapt(
    session: Session,
    runs: Sequence[TargetRun],
    prior: Prior,
    adaptation: Adaptation,
    log: RunLog,
    checkpoints: Checkpoints,
) -> None:
    """Runs the target stage from where `adaptation` stands to its last step; `adaptation.best` is the outcome.

    Args:
        runs: R of them, each of N tasks.
        prior: of as many runs.

    Raises:
        Stopped: a signal came; the checkpoint of the last step is written.
        UserError: a run's gradients were not finite for more than 10 steps in a row.
    """
    target, run, ranks, phases = session.recipe.target, session.recipe.run, session.ranks, log.phases
    tasks = [task for of_run in runs for task, _ in of_run.tasks]
    gradient_of = GradientPass.of(session, tasks, phases, before=adaptation.planned)
    adaptation.planned = gradient_of.planned
    about, flags = session.identity(), LateFlags(ranks.device)
    validation = {
        task.name: EncodedRows.of(session.encoder, task, splits.validation) for r in runs for task, splits in r.tasks
    }

    def draw(step: int) -> tuple[StepRows, torch.Tensor]:
        return draw_rows(runs, step, session.encoder)

    length = adaptation.tuned.length
    with TargetSteps(target, session.model, gradient_of, prior, phases, draw, session.stop, length) as next_step:
        while True:
            if _validation_due(target, adaptation.step) and adaptation.validated < adaptation.step:
                with phases.paused():
                    validate(session, runs, validation, prior.centre, adaptation, log)
            if adaptation.step == target.steps:
                if target.eval_every is None:
                    adaptation.keep_last()
                return
            found = next_step(adaptation)
            step = adaptation.step
            logged = is_log_step(step, run.log_every, target.steps)
            # saved before a validation too: one that a signal breaks off is done again on resume
            saved = step % run.save_every == 0 or step == target.steps or _validation_due(target, step)
            stop = _heed(flags.read(step, found.flags, now=logged or saved), adaptation, runs)
            if logged or saved:  # the host waits anyway
                _refuse_skipping(step, adaptation, runs)
            if logged:
                log_losses(log, runs, adaptation, learning_rates(target, adaptation.tuned, step), found.imbalance)
            log.advance(step)
            if saved or stop:  # all ranks go on when it is there: a launcher ends them all as soon as one has left
                state = about | adaptation.counters()
                ranks.first_does(partial(checkpoints.save, step, adaptation.tensors(), state))
            if stop:
                raise session.stop.stopped()


class TargetSteps:
    """Makes the steps of the target stage. A context: inside, the next step's rows are made while a step runs."""

    def __init__(
        self,
        target: TargetConfig,
        model: Sharded,
        gradient_of: GradientPass,
        prior: Prior,
        phases: Phases,
        draw: Callable[[int], tuple[StepRows, torch.Tensor]],
        stop: StopSignal,
        length: int,
    ):
        """
        Args:
            draw: the rows of a step and their counts [R, N], the same on all ranks; called in a thread.
            length: L.
        """
        self._target, self._model, self._gradient_of, self._prior = target, model, gradient_of, prior
        self._phases, self._stop = phases, stop

        def drawn(step: int) -> Drawn:
            rows, counts = draw(step)
            return Drawn(gradient_of.prepare(rows, counts.numel(), length), counts)

        self._ahead = Ahead(drawn, target.steps)

    def __enter__(self) -> "TargetSteps":
        self._ahead.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(*error)

    def __call__(self, adaptation: Adaptation) -> StepGradient:
        """Takes every run one step on; what the step was made of."""
        step, backbone, ranks = adaptation.step + 1, self._model.backbone, self._model.ranks
        with self._phases("data"):
            drawn = self._ahead.take(step)
        backbone.train(backbone.train_while_tuning)
        found = self._gradient_of(adaptation.tuned.through(), drawn.work, step, self._stop)
        counts = upload(drawn.counts, ranks.device)
        update(self._target, adaptation, self._prior, found.gradients, found.losses, counts, step, ranks, self._phases)
        adaptation.step = step
        self._phases.count_step()
        return found


def draw_rows(runs: Sequence[TargetRun], step: int, encoder: RowEncoder) -> tuple[StepRows, torch.Tensor]:
    """The rows of a step, run after run, and how many of them are of each task, [R, N].

    A run's rows are a function of its seed and the step. A row weighs 1 / batch size of its run; the prompt that reads
    it is number r * N + k, of run r and its task k.
    """
    rows: list[TokenRow] = []
    weights: list[float] = []
    prompt_of: list[int] = []
    counts = torch.zeros(len(runs), len(runs[0].tasks))
    for r, run in enumerate(runs):
        for k, i in run.draw(step):
            task, splits = run.tasks[k]
            rows.append(encoder.encode(task, splits.train[i]))
            weights.append(1 / run.batch_size)
            prompt_of.append(r * counts.shape[1] + k)
            counts[r, k] += 1
    return StepRows(rows, weights, prompt_of), counts


@torch.no_grad()
def update(
    target: TargetConfig,
    adaptation: Adaptation,
    prior: Prior,
    gradients: Sequence[torch.Tensor],
    losses: torch.Tensor,
    counts: torch.Tensor,
    step: int,
    ranks: Ranks,
    phases: Phases,
) -> None:
    """One step on all that is trained of every run: rank 0's, which the others take over.

    The loss of a run is the mean over its batch of row loss and prior of the row's prompt (Eq. 6 for one task). A run
    with a gradient that is not finite keeps every bit, but for its count of such steps; the host does not wait to find
    out. A task without a row in the batch has a gradient of 0: Adam's momentum alone moves its a and b.

    Args:
        gradients: of the mean row loss with respect to what rows are read through, R * N or R in front of each.
        losses: [R * N], what the rows of each prompt add to that mean.
        counts: [R, N], rows of each task in the batch.
    """
    tuned, losses, rows = adaptation.tuned, losses.view_as(counts), counts.sum(dim=1)  # [R]
    of_runs = [gradient.reshape(len(counts), -1) for gradient in gradients]
    prior_loss = prior_norm = torch.zeros_like(rows)
    finite = torch.isfinite(losses).all(dim=1)  # [R]
    with phases("prior"):
        if prior.kind != "none":
            prior_loss, of_prior = prior.gradient(tuned.composed(), counts / rows[:, None])
            prior_norm = of_prior.flatten(1).norm(dim=1)
            gradients = [gradients[0] + of_prior.view_as(gradients[0])]
            finite &= torch.isfinite(prior_loss) & torch.isfinite(prior_norm)
    for gradient in of_runs:
        finite &= torch.isfinite(gradient).all(dim=1)

    # everything is computed, then kept or not on the device: a branch here would wait for it
    def keep(old: torch.Tensor, new: torch.Tensor) -> None:
        old.copy_(torch.where(finite.view(-1, *[1] * (old.ndim - 1)), new, old))

    with phases("update"):
        _step(target, adaptation, tuned.pull_back(gradients), step, keep)
        keep(adaptation.losses, adaptation.losses + losses * rows[:, None])
        keep(adaptation.rows, adaptation.rows + counts)
        keep(adaptation.prior, adaptation.prior + prior_loss * rows)
        likelihood = torch.stack([gradient.norm(dim=1) for gradient in of_runs]).norm(dim=0)
        keep(adaptation.norms, torch.stack([likelihood, prior_norm], dim=1))
        adaptation.taken += finite
        adaptation.skipped += ~finite
        adaptation.skipped_in_a_row += 1
        keep(adaptation.skipped_in_a_row, torch.zeros_like(adaptation.skipped_in_a_row))
    with phases("broadcast"):
        for tensor in tuned.trained.values():
            ranks.broadcast_(tensor)


def _step(
    target: TargetConfig,
    adaptation: Adaptation,
    gradients: Mapping[str, torch.Tensor],
    step: int,
    keep: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """The optimizer's step; `keep(old, new)` writes where a run's gradient was finite."""
    if target.clip_norm is not None:
        factor = clip_factor(list(gradients.values()), target.clip_norm)
        gradients = {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}
    rates = learning_rates(target, adaptation.tuned, step)
    for name, value in adaptation.tuned.trained.items():
        gradient, lr = gradients[name], rates[adaptation.tuned.rate_of(name)]
        decayed = value * (1 - lr * target.weight_decay)
        if target.optimizer == "sgd":
            keep(value, decayed - lr * gradient)
            continue
        moments = [adaptation.moments[f"{name}.{moment}"] for moment in ("exp_avg", "exp_avg_sq")]
        number = (adaptation.taken + 1).view(-1, *[1] * (value.ndim - 1))
        moved = adam(decayed, gradient, *moments, number, lr=lr, betas=target.betas, eps=target.eps)
        for old, new in zip((value, *moments), moved, strict=True):
            keep(old, new)


def learning_rates(target: TargetConfig, tuned: Tuned, step: int) -> dict[str, float]:
    """Those that something trained has: of a prompt's W `lr_full`, of its a and b `lr_low_rank`."""
    factor = learning_rate_factor(step, steps=target.steps, warmup_steps=target.warmup_steps, schedule=target.schedule)
    bases = {"lr_full": target.lr_full, "lr_low_rank": target.lr_low_rank, **tuned.own_rates}
    return {name: bases[name] * factor for name in tuned.rates}


def _validation_due(target: TargetConfig, step: int) -> bool:
    return target.eval_every is not None and step > 0 and (step % target.eval_every == 0 or step == target.steps)


def _heed(flags: Iterable[tuple[int, bool, bool]], adaptation: Adaptation, runs: Sequence[TargetRun]) -> bool:
    """Whether to stop. Ends the job where a run's gradients stay non-finite; a few such steps only move nothing.

    Args:
        flags: step, whether its likelihood's gradients were finite, whether somebody wants to stop.
    """
    stop = False
    for step, finite, wished in flags:
        stop |= wished
        if not finite:
            _refuse_skipping(step, adaptation, runs)
    return stop


def _refuse_skipping(step: int, adaptation: Adaptation, runs: Sequence[TargetRun]) -> None:
    """Ends the job where a run has moved nothing for too many steps; waits for the device."""
    for run, count in zip(runs, adaptation.skipped_in_a_row.tolist(), strict=True):
        if count > (run.drawn_as.max_skipped if run.drawn_as else MAX_SKIPPED):
            which = f"run {run.name}: " if run.name else ""
            keys = "source.lr" if run.drawn_as else " and ".join(_RATES[name] for name in adaptation.tuned.rates)
            raise UserError(f"step {step}: {which}gradients were not finite for {count} steps in a row; lower {keys}")
