"""MPT (Wang et al. 2023): one prompt shared by all source tasks, rank-one parts of each task, taught by source prompts.

    theta_k = P * (u_k v_k^T),   k = 1 .. K                                                  elementwise product
    a row's loss = L + lambda (KL[p(y | teacher_k ; x) || p(y | theta_k ; x)] + MSE(h(theta_k), h(teacher_k)))

The source stage first trains a teacher for each task (`source_prompts.py`, `mpt.teacher_steps`), then P, u and v on
steps of kappa tasks ("stochastic task sampling" is our `source.tasks_per_step`). The target prompt begins at
P * (mean u (mean v)^T) and all of it is trained, P at `target.lr_full` (0.3), u and v at `target.lr_low_rank` (0.4):
L H + L + H numbers a task, 77.7K at T5-base with L = 100 (the tables say 77.6K), L H / N + L + H of N tasks at once.

lambda is 0.9 (`mpt.distillation`). Their paper leaves open what we settle so: u and v begin at ones, P at vocabulary
rows; KL is the mean over target tokens, h the last hidden states, of the encoder over the text and of the decoder over
the target, MSE the mean over tokens and H, encoder and decoder added up. Rows that teachers read count as processed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.data.tokens import IGNORE, Batch
from bmtpt_ds.losses import Prompts, of_rows
from bmtpt_ds.methods.job import AdaptJob, Begun, Learned, SourceJob, as_target, train, without_prior
from bmtpt_ds.methods.source_prompts import train_alone
from bmtpt_ds.model.backbone import Backbone, States, mean_over_targets, mean_over_texts, mean_token_losses


def learn(job: SourceJob) -> Learned:
    """`shared` [L, H] and of each task `<task>.a` [L] and `<task>.b` [H]: P, u and v."""
    session, recipe = job.session, job.session.recipe
    source, weight, names = recipe.source, recipe.mpt.distillation, [task.name for task, _ in job.tasks]
    begin = session.initial_prompts(len(names) + 1)[-1:]  # none of the teachers begins there
    student, rows = TunedPrompt.begin(begin, len(names)), source.steps * source.kappa * source.rows_per_task
    if weight:
        session.ranks.first_does(job.directory.open)
        steps = recipe.mpt.teacher_steps or source.steps
        teachers = train_alone(job, job.directory.part("teachers"), steps)
        student = TaughtPrompt(student, teachers, weight)
        rows = 2 * rows + steps * len(names) * source.rows_per_task
    run = TargetRun("", recipe, job.tasks, drawn_as=source)
    found = train(session, job.directory, [run], without_prior(student), as_target(source)).tuned
    stored = found.stored(0, names)
    stored["shared"] = stored.pop("full")
    what = f"a prompt of {' x '.join(map(str, begin.shape[1:]))} and rank-one parts of {len(names)} tasks"
    return Learned(stored, found.parameters(), rows, what)


def begin(job: AdaptJob) -> Begun:
    """W at P, a and b at the means of u and v."""
    shared, names, runs = job.source_tensor("shared"), job.stored.state["tasks"], len(job.runs)
    tuned = TunedPrompt.begin(shared.expand(runs, *shared.shape), job.tasks)
    for tensor, part in ((tuned.a, "a"), (tuned.b, "b")):
        tensor.copy_(torch.stack([job.source_tensor(f"{name}.{part}") for name in names]).mean(dim=0))
    return without_prior(tuned)


class TaughtPrompt(TunedPrompt):
    """Decomposed prompts of K tasks, in a single run, that learn from their teachers too."""

    def __init__(self, prompt: TunedPrompt, teachers: torch.Tensor, weight: float):
        """
        Args:
            teachers: [K, L, H].
            weight: lambda.
        """
        super().__init__(*prompt.tensors())
        self.teachers, self.weight = teachers, weight

    def through(self) -> "Taught":
        return Taught(super().through().prompts, self.teachers, self.weight)


@dataclass(frozen=True)
class Taught(Prompts):
    """Prompts [P, L, H] whose rows' losses tell how far they are from what a teacher makes of the row."""

    teachers: torch.Tensor  # [P, L, H]
    weight: float  # lambda

    def row_losses(
        self, backbone: Backbone, leaves: Sequence[torch.Tensor], numbers: Sequence[int], batches: Sequence[Batch]
    ) -> torch.Tensor:
        training = backbone.training
        backbone.eval()  # a teacher has no dropout
        with torch.no_grad():
            taught = backbone.states(of_rows(self.teachers, numbers), batches)
        backbone.train(training)
        states = backbone.states(of_rows(leaves[0], numbers), batches)
        losses = mean_token_losses(states.logits, [batch.labels for batch in batches])
        return losses + self.weight * distillation(states, taught, batches, self.teachers.shape[1])


def distillation(student: States, teacher: States, batches: Sequence[Batch], length: int) -> torch.Tensor:
    """KL and hidden-state terms of each row, [N].

    Args:
        length: L.
    """
    labels = [batch.labels for batch in batches]
    seen = (torch.cat([of_bucket.flatten() for of_bucket in labels]) != IGNORE).float()
    wanted, found = (log_softmax(states.logits.float(), dim=-1) for states in (teacher, student))
    kl = (wanted.exp() * (wanted - found)).sum(dim=-1)
    decoded = (student.decoded.float() - teacher.decoded.float()).square().mean(dim=-1)
    encoded = (student.encoded.float() - teacher.encoded.float()).square().mean(dim=-1)
    return mean_over_targets((kl + decoded) * seen, labels) + mean_over_texts(encoded, batches, length)
