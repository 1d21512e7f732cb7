"""SPoT (Vu et al. 2022): a prompt a source task; the target's begins at the one whose task is most like it.

    theta^T begins at theta_k*,   k* = argmax_k sim(theta_k, probe)
    sim = cos(mean_l theta_k[l], mean_l probe[l])            `average`, or the mean of cos over all pairs: `per_token`

The probe is a prompt trained on the target task for a few steps (a task's embedding, their section 3.2: prompts early
in training tell tasks apart), from vocabulary rows: `spot.probe_steps`, by default a tenth of the run's, which count
among the rows processed. Then prompt tuning: L H numbers a task, 76.8K at T5-base with L = 100. Of their ways to use
the similarity this is "best of top 1", that of the papers whose figures the tables quote.
"""

import json

import torch
from torch.nn.functional import normalize

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.files import write_atomically
from bmtpt_ds.methods.job import AdaptJob, Begun, train, without_prior
from bmtpt_ds.methods.source_prompts import learn
from bmtpt_ds.quiet import say

__all__ = ["begin", "learn", "similarity"]

SIMILARITY = "similarity.json"  # in the probe's folder


def similarity(probe: torch.Tensor, sources: torch.Tensor, kind: str) -> torch.Tensor:
    """Of a prompt [L, H] with each source prompt [K, L, H], [K] in -1 .. 1.

    Args:
        kind: `average` or `per_token`.
    """
    if kind == "average":
        return normalize(sources.mean(dim=1), dim=1) @ normalize(probe.mean(dim=0), dim=0)
    return normalize(sources, dim=2).mean(dim=1) @ normalize(probe, dim=1).mean(dim=0)


def begin(job: AdaptJob) -> Begun:
    """Every run's prompt at the source prompt that its probe is most like; `probe/similarity.json` tells of all."""
    recipe, names = job.session.recipe, job.stored.state["tasks"]
    steps, sources = recipe.probe_steps, job.source_tensor("particles")
    probes = _probes(job, steps)
    found = torch.stack([similarity(probe, sources, recipe.spot.similarity) for probe in probes])  # [R, K]
    chosen = found.argmax(dim=1)
    told = {}
    for run, k, of_run in zip(job.runs, chosen.tolist(), found.tolist(), strict=True):
        told[run.name] = dict(zip(names, of_run, strict=True))
        say(f"spot: {f'{run.name} ' * bool(run.name)}begins at the prompt of {names[k]} (similarity {of_run[k]:.3f})")
    text, file = json.dumps(told, indent=2) + "\n", job.directory.part("probe").path / SIMILARITY
    job.session.ranks.first_does(lambda: write_atomically(file, text.encode()))
    begun = without_prior(TunedPrompt.begin(sources[chosen], job.tasks, low_rank=False))
    return Begun(begun.tuned, begun.prior, steps * job.runs[0].batch_size)


def _probes(job: AdaptJob, steps: int) -> torch.Tensor:
    """A prompt of each run's tasks after so many steps from vocabulary rows, [R, L, H]."""
    target = job.session.recipe.target.model_copy(update={"steps": steps, "warmup_steps": None, "eval_every": None})
    start = TunedPrompt.begin(job.vocabulary_prompts(), job.tasks, low_rank=False)
    job.session.ranks.first_does(job.directory.open)
    return train(job.session, job.directory.part("probe"), job.runs, without_prior(start), target).tuned.full
