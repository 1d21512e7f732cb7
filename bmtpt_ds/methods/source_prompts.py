"""A prompt for each source task, each trained alone: where SPoT, ATTEMPT and MPT begin.

    theta_k = argmin_theta - log p(D_k^S | theta),   k = 1 .. K

They are K runs of prompt tuning side by side. A step reads the rows that a step of BMTPT with the same seed reads, each
through the prompt of its own task. As there the last step counts; `source.eval_every` only tells.
"""

import torch

from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.methods.job import Learned, SourceJob, as_target, train, without_prior
from bmtpt_ds.run_directory import RunDirectory


def train_alone(job: SourceJob, directory: RunDirectory, steps: int | None = None) -> torch.Tensor:
    """The source tasks' prompts [K, L, H], in the order of the tasks.

    Args:
        directory: where log and checkpoints lie.
        steps: default: source.steps.
    """
    recipe = job.session.recipe
    target = as_target(recipe.source, steps)
    runs = []
    for of_task in job.tasks:
        name = of_task.task.name
        drawn = recipe.source.model_copy(update={"tasks": [name], "tasks_per_step": "all"})
        runs.append(TargetRun(name, recipe, [of_task], drawn_as=drawn))
    tuned = TunedPrompt.begin(job.session.initial_prompts(len(runs)), 1, low_rank=False)
    return train(job.session, directory, runs, without_prior(tuned), target).tuned.full


def learn(job: SourceJob) -> Learned:
    """`particles` [K, L, H]: in a file of this kind the prompts of the source tasks, in the order of its tasks."""
    source = job.session.recipe.source
    prompts = train_alone(job, job.directory)
    rows = source.steps * len(prompts) * source.rows_per_task
    _, length, hidden = prompts.shape
    return Learned({"particles": prompts}, prompts.numel(), rows, f"{len(prompts)} prompts of {length} x {hidden}")
