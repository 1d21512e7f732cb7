"""Stage 2: the centre of the posterior adapted to a target task (Algorithm 1, lower half; Eq. 6).

Symbols: M particles, L prompt length, H hidden size. theta_bar is the particles' mean, theta_T the target prompt
W * (a b^T), W [L, H] begun at theta_bar, a [L] and b [H] at ones; all three are trained, at two learning rates.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from bmtpt_ds.checkpoint import Checkpoints
from bmtpt_ds.config import TargetConfig
from bmtpt_ds.data.order import batch_positions
from bmtpt_ds.data.splits import Splits
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import score_rows
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.parallel import Ranks
from bmtpt_ds.runlog import Phases, RunLog, is_log_step, steps_since_line
from bmtpt_ds.schedule import learning_rate_factor
from bmtpt_ds.session import Session
from bmtpt_ds.tasks import Task

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
        """- log p(theta_T | D^S) up to a constant, a scalar; zero at a lone particle.

        `gaussian` is the bound of Eq. 5 and 6, `mixture` the exact sum of Eq. 4.
        """
        if self.kind == "none":
            return theta.new_zeros(())
        if self.kind == "gaussian":
            return (theta - self.centre).square().sum() / (2 * self.sigma**2)
        distances = (theta - self.particles).square().sum(dim=(1, 2))
        return math.log(len(distances)) - torch.logsumexp(-distances / (2 * self.sigma**2), dim=0)


class Adaptation:
    """Where the target stage stands, the same on all ranks: all that a checkpoint needs."""

    def __init__(self, centre: torch.Tensor, target: TargetConfig):
        self.prompt = ComposedPrompt.start_at(centre)
        self.best = ComposedPrompt.start_at(centre)
        self.best_score, self.best_step = -math.inf, 0
        self.step, self.validated, self.skipped, self.skipped_in_a_row = 0, 0, 0, 0
        self.sums = centre.new_zeros(2)  # of loss and prior since the last line of the log
        self.norms = centre.new_zeros(2)  # of the last step's likelihood and prior gradients
        self.optimizer = _optimizer(self.prompt, target)

    def describe(self) -> str:
        """In a few words for a person."""
        length, hidden = self.prompt.full.shape
        return f"a prompt of {length} x {hidden}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of everything; writing into them restores it."""
        named = {"sums": self.sums, "norms": self.norms}
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
    task: Task,
    splits: Splits,
    prior: Prior,
    adaptation: Adaptation,
    log: RunLog,
    checkpoints: Checkpoints,
) -> None:
    """Runs the target stage from where `adaptation` stands to its last step; `adaptation.best` is the outcome.

    Args:
        splits: `train` holds the few-shot rows where the recipe asks for some.

    Raises:
        Stopped: a signal came; the checkpoint of the last step is written.
        UserError: gradients were not finite for more than 10 steps in a row.
    """
    target, run, ranks, phases = session.recipe.target, session.recipe.run, session.ranks, log.phases
    gradient_of = GradientPass.of(session, phases)
    backbone, about = session.model.backbone, session.identity()
    batch_size = min(target.batch_size, len(splits.train))
    while True:
        if _validation_due(target, adaptation.step) and adaptation.validated < adaptation.step:
            with phases.paused():
                validate(session, task, splits, prior, adaptation, log)
        if adaptation.step == target.steps:
            return
        step = adaptation.step + 1
        with phases("data"):
            chosen = batch_positions(run.seed, step, len(splits.train), batch_size)
            rows = [session.encoder.encode(task, splits.train[i]) for i in chosen]
        backbone.train(backbone.train_while_tuning)
        theta = adaptation.prompt.compose().detach()
        gradient = gradient_of(theta[None], rows, step, session.stop)
        with phases("update"):
            _count_skipped(adaptation, gradient.finite, step)
            if gradient.finite:
                prior_loss = update(target, adaptation, prior, gradient.gradient[0], step, ranks)
                adaptation.sums += torch.stack([gradient.losses[0], prior_loss])
        adaptation.step = step
        phases.count_step()
        if is_log_step(step, run.log_every, target.steps):
            log.line(metrics_of(target, run.log_every, adaptation, phases))
            adaptation.sums.zero_()
        log.advance(step)
        # saved before a validation too: one that a signal breaks off is done again on resume
        save = step % run.save_every == 0 or gradient.stop or _validation_due(target, step)
        if save:  # all ranks go on when it is there: a launcher ends them all as soon as one has left
            state = about | adaptation.counters()
            ranks.first_does(partial(checkpoints.save, step, adaptation.tensors(), state))
        if gradient.stop:
            raise session.stop.stopped()


def _validation_due(target: TargetConfig, step: int) -> bool:
    return step > 0 and (step % target.eval_every == 0 or step == target.steps)


def update(
    target: TargetConfig, adaptation: Adaptation, prior: Prior, gradient: torch.Tensor, step: int, ranks: Ranks
) -> torch.Tensor:
    """One step on W, a and b: rank 0's, which the others take over.

    The loss of Eq. 6 is the mean row loss plus the prior. `gradient` [L, H] is that of the mean row loss with respect
    to the composed prompt; a linear function of the same gradient stands for it, and autograd does the chain rule.

    Returns:
        the prior's value before the step.
    """
    composed = adaptation.prompt.compose()
    prior_loss = prior.negative_log(composed)
    (prior_gradient,) = torch.autograd.grad(prior_loss, composed) if prior_loss.requires_grad else (0 * gradient,)
    adaptation.norms.copy_(torch.stack([gradient.norm(), prior_gradient.norm()]))

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


def validate(session: Session, task: Task, splits: Splits, prior: Prior, adaptation: Adaptation, log: RunLog) -> None:
    """Scores the prompt on the validation rows, keeps it if none was better, logs how far it has moved."""
    theta = adaptation.prompt.compose().detach()
    scored = score_rows(session, theta, task, splits.validation).score
    if scored.score > adaptation.best_score:
        adaptation.best_score, adaptation.best_step = scored.score, adaptation.step
        for best, now in zip(adaptation.best.tensors(), adaptation.prompt.tensors(), strict=True):
            best.copy_(now.detach())
    adaptation.validated = adaptation.step
    likelihood, of_prior = adaptation.norms.tolist()
    moved = (theta - prior.centre).norm() / prior.centre.norm()
    log.line(
        {
            "step": adaptation.step,
            "validation": {task.name: scored.score, "best": adaptation.best_score, "best_step": adaptation.best_step},
            "prior_gradient_ratio": of_prior / likelihood if likelihood else None,
            "relative_distance": moved.item(),
        }
    )


def metrics_of(target: TargetConfig, log_every: int, adaptation: Adaptation, phases: Phases) -> dict:
    """The line of metrics.jsonl at the adaptation's step."""
    step = adaptation.step
    loss, prior_loss = (adaptation.sums / steps_since_line(step, log_every)).tolist()
    factor = learning_rate(target, step)
    return {
        "step": step,
        "loss": loss,
        "prior": prior_loss,
        "lr_full": target.lr_full * factor,
        "lr_low_rank": target.lr_low_rank * factor,
        "skipped": adaptation.skipped,
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
