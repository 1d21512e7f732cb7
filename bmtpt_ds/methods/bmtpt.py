"""BMTPT (Lee et al. 2023), and the base of the others: particles of the source tasks' posterior, their mean adapted.

`source.py` and `target.py` are the method; here they are put into a run.
"""

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.errors import UserError
from bmtpt_ds.methods.job import AdaptJob, Begun, Learned, SourceJob
from bmtpt_ds.methods.stage_run import open_log, restore
from bmtpt_ds.source import Posterior, learn_posterior, svgd_backend
from bmtpt_ds.target import Prior


def learn(job: SourceJob) -> Learned:
    """The source stage of Algorithm 1; `particles` [M, L, H]."""
    session, source = job.session, job.session.recipe.source
    posterior = Posterior.start(session.initial_prompts(source.particles), source.optimizer)
    session.ranks.together(lambda: svgd_backend(source, posterior.particles))  # before anything is written
    restore(session, job.directory, posterior)
    session.ranks.first_does(job.directory.open)
    log = open_log(session, job.directory, posterior, source.steps, job.tasks)
    learn_posterior(session, job.tasks, posterior, log, job.directory.checkpoints)
    log.close()
    rows = source.steps * source.particles * source.kappa * source.rows_per_task
    tensors = {"particles": posterior.particles}
    return Learned(tensors, posterior.particles.numel(), rows, posterior.describe())


def begin(job: AdaptJob) -> Begun:
    """W at the particles' mean, a and b at ones; the particles are the prior. Without them: W at vocabulary rows.

    Raises:
        UserError: `target.start` is no particle's number.
    """
    target = job.session.recipe.target
    if job.stored is None:
        prior = Prior("none", job.vocabulary_prompts()[:, None], target.sigma)
    else:
        particles = job.source_tensor("particles")
        if target.start != "mean":
            if target.start >= len(particles):
                raise UserError(
                    f"target.start: {target.start}: {job.stored.path} holds {len(particles)} particles; "
                    f"give 0 to {len(particles) - 1}, or mean"
                )
            particles = particles[target.start : target.start + 1]
        prior = Prior(target.prior, particles.expand(len(job.runs), *particles.shape), target.sigma)
    return Begun(TunedPrompt.begin(prior.centre, job.tasks), prior)
