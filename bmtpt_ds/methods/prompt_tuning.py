"""Prompt tuning (Lester et al. 2021): one prompt theta [L, H] before the text, trained on the target task alone.

    theta* = argmin_theta - log p(D^T | theta),   theta begins at embeddings of random common tokens

There is no source stage. L H numbers a task, 76.8K at T5-base with L = 100. Its authors train at a constant rate of 0.3
with Adafactor; the papers that the tables quote use AdamW at 0.3 with linear decay, the defaults of our target stage.
Several tasks at once (`target.multi`) share the prompt.
"""

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.methods.job import AdaptJob, Begun, without_prior


def begin(job: AdaptJob) -> Begun:
    return without_prior(TunedPrompt.begin(job.vocabulary_prompts(), job.tasks, low_rank=False))
