"""Stage 2: the centre of the posterior adapted to target tasks (Algorithm 1, lower half; Eq. 6).

Symbols: M particles, L prompt length, H hidden size, N target tasks. theta_bar is the particles' mean, theta_T a task's
prompt W * (a b^T): W [L, H], begun at theta_bar, is shared by the tasks, a [L] and b [H], begun at ones, are the
task's own. All are trained, at two learning rates, on batches of the rows of all tasks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from bmtpt_ds.checkpoint import Checkpoints
from bmtpt_ds.config import TargetConfig
from bmtpt_ds.data.order import mixed_batch, mixed_rows
from bmtpt_ds.data.splits import TaskSplits
from bmtpt_ds.data.tokens import upload
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import score_rows
from bmtpt_ds.losses import GradientPass, StepGradient
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.runlog import Phases, RunLog, is_log_step
from bmtpt_ds.schedule import learning_rate_factor
from bmtpt_ds.session import Session

MAX_SKIPPED = 10  # steps in a row with non-finite gradients that stop the run


@dataclass(frozen=True)
class Prior:
    """p(theta_T | D^S), the posterior of the source tasks as prior of the target prompt (section 4.1)."""

    kind: str  # `gaussian`, `mixture` or `none`
    particles: torch.Tensor  # [M, L, H] float32
    sigma: float  # standard deviation of p(theta_T | theta_i), in units of embeddings

    @cached_property  # asked for at every step
    def centre(self) -> torch.Tensor:
        """theta_bar [L, H]."""
        return self.particles.mean(dim=0)

    def negative_log(self, theta: torch.Tensor) -> torch.Tensor:
        """- log p(theta_T | D^S) up to a constant, [N] of prompts [N, L, H]; zero at a lone particle.

        `gaussian` is the bound of Eq. 5 and 6, `mixture` the exact sum of Eq. 4.
        """
        if self.kind == "none":
            return theta.new_zeros(len(theta))
        if self.kind == "gaussian":
            return (theta - self.centre).square().sum(dim=(1, 2)) / (2 * self.sigma**2)
        distances = (theta[:, None] - self.particles).square().sum(dim=(2, 3))
        return math.log(len(self.particles)) - torch.logsumexp(-distances / (2 * self.sigma**2), dim=1)


class Adaptation:
    """Where the target stage stands, the same on all ranks: all that a checkpoint needs."""

    def __init__(self, centre: torch.Tensor, tasks: int, target: TargetConfig):
        self.prompt = ComposedPrompt.start_at(centre, tasks)
        self.best = ComposedPrompt.start_at(centre, tasks)
        self.best_score, self.best_step = -math.inf, 0
        self.step, self.validated, self.skipped, self.skipped_in_a_row = 0, 0, 0, 0
        self.losses = centre.new_zeros(tasks)  # of the tasks' rows, summed since the last line of the log
        self.rows = centre.new_zeros(tasks)  # how many these were
        self.prior = centre.new_zeros(())  # of these rows' prompts, summed
        self.norms = centre.new_zeros(2)  # of the last step's likelihood and prior gradients
        self.optimizer = _optimizer(self.prompt, target)

    def describe(self) -> str:
        """In a few words for a person."""
        length, hidden = self.prompt.full.shape
        tasks = len(self.prompt.a)
        what = f"{tasks} prompts of {length} x {hidden} with one W" if tasks > 1 else f"a prompt of {length} x {hidden}"
        return f"{what}, {self.prompt.parameters_a_task():,.0f} parameters{' a task' * (tasks > 1)}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of everything; writing into them restores it."""
        named = {name: getattr(self, name) for name in ("losses", "rows", "prior", "norms")}
        for prefix, prompt in (("prompt", self.prompt), ("best", self.best)):
            named |= {f"{prefix}.{name}": value.detach() for name, value in vars(prompt).items()}
        for name, parameter in vars(self.prompt).items():
            named |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return named

    def counters(self) -> dict[str, float]:
        names = ("best_score", "best_step", "validated", "skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names if math.isfinite(getattr(self, name))}

    def restore(self, tensors: dict[str, torch.Tensor], saved: dict) -> None:
        """Takes over what `tensors` and `counters` gave."""
        for name, parameter in vars(self.prompt).items():
            prefix = f"optimizer.{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # Adam's step count stays on the CPU, where torch keeps it; its moments go to the parameter
            self.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device) for key, value in own.items()
            }
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        for name in self.counters().keys() | saved.keys() & {"best_score"}:
            setattr(self, name, saved[name])
        self.step = saved["step"]


def adapt(
    session: Session,
    tasks: Sequence[TaskSplits],
    prior: Prior,
    adaptation: Adaptation,
    log: RunLog,
    checkpoints: Checkpoints,
) -> None:
    """Runs the target stage from where `adaptation` stands to its last step; `adaptation.best` is the outcome.

    Args:
        tasks: N of them, in the order of the prompts; `train` holds the few-shot rows where the recipe asks for some.

    Raises:
        Stopped: a signal came; the checkpoint of the last step is written.
        UserError: gradients were not finite for more than 10 steps in a row.
    """
    target, run, ranks, phases = session.recipe.target, session.recipe.run, session.ranks, log.phases
    gradient_of = GradientPass.of(session, [task for task, _ in tasks], phases)
    backbone, about = session.model.backbone, session.identity()
    n_rows, batch_size = train_sizes(tasks), batch_size_of(target, tasks)
    while True:
        if _validation_due(target, adaptation.step) and adaptation.validated < adaptation.step:
            with phases.paused():
                validate(session, tasks, prior, adaptation, log)
        if adaptation.step == target.steps:
            return
        step = adaptation.step + 1
        with phases("data"):
            drawn = mixed_batch(run.seed, step, n_rows, batch_size)
            rows = [session.encoder.encode(tasks[k].task, tasks[k].splits.train[i]) for k, i in drawn]
            work = gradient_of.prepare(
                StepRows.evenly(rows, [k for k, _ in drawn]), len(tasks), session.recipe.prompt.length
            )
        backbone.train(backbone.train_while_tuning)
        theta = adaptation.prompt.compose().detach()
        gradient = gradient_of(theta, work, step, session.stop)
        with phases("update"):
            _count_skipped(adaptation, gradient.finite, step)
            if gradient.finite:
                counts = upload(torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(tasks)).float(), ranks.device)
                share = counts / batch_size
                prior_loss = update(target, adaptation, prior, gradient.gradient, share, step, ranks)
                adaptation.prior += prior_loss * batch_size
                adaptation.losses += gradient.losses * batch_size
                adaptation.rows += counts
        adaptation.step = step
        phases.count_step()
        if is_log_step(step, run.log_every, target.steps):
            log.line(metrics_of(target, n_rows, adaptation, gradient, phases))
            for sums in (adaptation.losses, adaptation.rows, adaptation.prior):
                sums.zero_()
        log.advance(step)
        # saved before a validation too: one that a signal breaks off is done again on resume
        save = step % run.save_every == 0 or gradient.stop or _validation_due(target, step)
        if save:  # all ranks go on when it is there: a launcher ends them all as soon as one has left
            state = about | adaptation.counters()
            ranks.first_does(partial(checkpoints.save, step, adaptation.tensors(), state))
        if gradient.stop:
            raise session.stop.stopped()


def train_sizes(tasks: Sequence[TaskSplits]) -> dict[str, int]:
    """Rows to train on, by task."""
    return {task.name: len(splits.train) for task, splits in tasks}


def batch_size_of(target: TargetConfig, tasks: Sequence[TaskSplits]) -> int:
    """Rows of a step: never more than there are."""
    return min(target.batch_size, mixed_rows(train_sizes(tasks)))


def _validation_due(target: TargetConfig, step: int) -> bool:
    return step > 0 and (step % target.eval_every == 0 or step == target.steps)


def update(
    target: TargetConfig,
    adaptation: Adaptation,
    prior: Prior,
    gradient: torch.Tensor,
    share: torch.Tensor,
    step: int,
    ranks: Ranks,
) -> torch.Tensor:
    """One step on W and every a and b: rank 0's, which the others take over.

    The loss is the mean over the batch's rows of row loss and prior of the row's prompt (Eq. 6 for one task). A linear
    function of its gradient with respect to the composed prompts stands for it, and autograd does the chain rule.

    Args:
        gradient: [N, L, H], of the mean row loss with respect to the composed prompts.
        share: [N], of the batch's rows those of each task.

    Returns:
        the mean of the rows' priors before the step.
    """
    composed = adaptation.prompt.compose()
    prior_loss = (share * prior.negative_log(composed)).sum()
    (prior_gradient,) = torch.autograd.grad(prior_loss, composed) if prior_loss.requires_grad else (0 * gradient,)
    adaptation.norms.copy_(torch.stack([gradient.norm(), prior_gradient.norm()]))

    # a task without a row in the batch has a gradient of 0: Adam's momentum alone moves its a and b
    composed = adaptation.prompt.compose()
    adaptation.optimizer.zero_grad()
    (composed * (gradient + prior_gradient)).sum().backward()
    parameters = adaptation.prompt.tensors()
    if target.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, target.clip_norm)
    factor = learning_rate(target, step)
    for group, base in zip(adaptation.optimizer.param_groups, (target.lr_full, target.lr_low_rank), strict=True):
        group["lr"] = base * factor
    adaptation.optimizer.step()
    with torch.no_grad():
        for parameter in parameters:
            ranks.broadcast_(parameter)
    return prior_loss.detach()


def learning_rate(target: TargetConfig, step: int) -> float:
    """Factor on both learning rates."""
    return learning_rate_factor(step, steps=target.steps, warmup_steps=target.warmup_steps, schedule=target.schedule)


def validate(session: Session, tasks: Sequence[TaskSplits], prior: Prior, adaptation: Adaptation, log: RunLog) -> None:
    """Scores the prompts on the validation rows, each task's by its own metric; keeps them if no mean was better.

    Logs how far they have moved.
    """
    theta = adaptation.prompt.compose().detach()
    scores = {
        task.name: score_rows(session, prompt, task, splits.validation).score.score
        for (task, splits), prompt in zip(tasks, theta, strict=True)
    }
    mean = sum(scores.values()) / len(scores)
    if mean > adaptation.best_score:
        adaptation.best_score, adaptation.best_step = mean, adaptation.step
        for best, now in zip(adaptation.best.tensors(), adaptation.prompt.tensors(), strict=True):
            best.copy_(now.detach())
    adaptation.validated = adaptation.step
    likelihood, of_prior = adaptation.norms.tolist()
    moved = (theta - prior.centre).norm(dim=(1, 2)) / prior.centre.norm()
    best = {"mean": mean, "best": adaptation.best_score, "best_step": adaptation.best_step}
    log.line(
        {
            "step": adaptation.step,
            "validation": scores | best,
            "prior_gradient_ratio": of_prior / likelihood if likelihood else None,
            "relative_distance": dict(zip(scores, moved.tolist(), strict=True)),
        }
    )


def metrics_of(
    target: TargetConfig, names: Iterable[str], adaptation: Adaptation, gradient: StepGradient, phases: Phases
) -> dict:
    """The line of metrics.jsonl at the adaptation's step; `names` of the tasks."""
    losses, rows, factor = adaptation.losses, adaptation.rows, learning_rate(target, adaptation.step)
    of_tasks = dict(zip(names, (losses / rows).tolist(), strict=True))  # nan: no row of a task was drawn
    return {
        "step": adaptation.step,
        "loss": (losses.sum() / rows.sum()).item(),
        **({"task_losses": of_tasks} if len(of_tasks) > 1 else {}),
        "prior": (adaptation.prior / rows.sum()).item(),
        "lr_full": target.lr_full * factor,
        "lr_low_rank": target.lr_low_rank * factor,
        "skipped": adaptation.skipped,
        "imbalance": round(gradient.imbalance, 4),
        **phases.take(),
    }


def _optimizer(prompt: ComposedPrompt, target: TargetConfig) -> torch.optim.Optimizer:
    """Two groups, W and (a, b); the learning rates are set at each step."""
    for tensor in prompt.tensors():
        tensor.requires_grad_()
    groups = [{"params": [prompt.full], "lr": 0.0}, {"params": [prompt.a, prompt.b], "lr": 0.0}]
    if target.optimizer == "sgd":
        return torch.optim.SGD(groups, weight_decay=target.weight_decay)
    return torch.optim.AdamW(groups, betas=target.betas, eps=target.eps, weight_decay=target.weight_decay)


def _count_skipped(adaptation: Adaptation, finite: bool, step: int) -> None:
    adaptation.skipped += not finite
    adaptation.skipped_in_a_row = 0 if finite else adaptation.skipped_in_a_row + 1
    if adaptation.skipped_in_a_row > MAX_SKIPPED:
        raise UserError(
            f"step {step}: gradients were not finite for {adaptation.skipped_in_a_row} steps in a row; "
            "lower target.lr_full and target.lr_low_rank"
        )
