"""Vanilla transfer (the paper's table 1): one prompt on all source tasks together, then on the target task.

    theta^S = argmin_theta - sum_k log p(D_k^S | theta),   theta^T begins at theta^S

The source stage is BMTPT's with a single particle, whose SVGD step is a plain gradient step: the same rows, a M-th of
its budget. The target stage trains all L H numbers without prior or composition: 76.8K at T5-base with L = 100.
Learning rates are those of prompt tuning.
"""

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.errors import UserError
from bmtpt_ds.methods.bmtpt import learn
from bmtpt_ds.methods.job import AdaptJob, Begun, without_prior

__all__ = ["begin", "learn"]


def begin(job: AdaptJob) -> Begun:
    particles = job.source_tensor("particles")
    if len(particles) > 1:
        raise UserError(
            f"{job.stored.path}: holds {len(particles)} particles, vanilla_transfer takes one prompt: "
            "give a run of `bmtpt source` with method=vanilla_transfer"
        )
    centres = particles.expand(len(job.runs), *particles.shape[1:])
    return without_prior(TunedPrompt.begin(centres, job.tasks, low_rank=False))
