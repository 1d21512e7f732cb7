"""What a method is given, what it gives back, and how it trains: with the loop of `target.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.config import SourceConfig, StageConfig, TargetConfig
from bmtpt_ds.data.splits import TaskSplits
from bmtpt_ds.methods.stage_run import open_log, restore
from bmtpt_ds.run_directory import RunDirectory
from bmtpt_ds.session import Session
from bmtpt_ds.target import Prior, adapt


@dataclass(frozen=True)
class SourceJob:
    """A source stage to run."""

    session: Session
    tasks: Sequence[TaskSplits]  # K
    directory: RunDirectory


@dataclass(frozen=True)
class Learned:
    """What a source stage leaves."""

    tensors: dict[str, torch.Tensor]
    parameters: int  # trained numbers
    rows: int  # rows times prompts that the backbone read, those that only teach too
    says: str  # of the tensors, for a person


@dataclass(frozen=True)
class AdaptJob:
    """A target stage to begin."""

    session: Session
    runs: Sequence[TargetRun]  # R
    directory: RunDirectory
    stored: Stored | None  # what `--particles` names

    @property
    def tasks(self) -> int:
        """N."""
        return len(self.runs[0].tasks)

    def vocabulary_prompts(self) -> torch.Tensor:
        """A prompt from vocabulary rows for each run, of its seed: [R, L, H]."""
        begun = [replace(self.session, recipe=run.recipe).initial_prompts(1) for run in self.runs]
        return torch.cat(begun)

    def source_tensor(self, name: str) -> torch.Tensor:
        """One of the tensors that the source stage left, on the device."""
        return self.stored.tensors[name].to(self.session.ranks.device)


@dataclass(frozen=True)
class Begun:
    """What the target stage trains, and its prior."""

    tuned: Tuned
    prior: Prior
    rows: int = 0  # that each run has processed before


def without_prior(tuned: Tuned) -> Begun:
    """Of a method that has none; distances are told from where the prompts begin."""
    theta = tuned.composed()
    centre = torch.zeros(tuned.runs, 1, 0, 0) if theta is None else theta[:, :1]  # tasks begin alike
    return Begun(tuned, Prior("none", centre, 1.0))


def train(
    session: Session,
    directory: RunDirectory,
    runs: Sequence[TargetRun],
    begun: Begun,
    target: TargetConfig,
    places: Mapping[str, RunDirectory] | None = None,
) -> Adaptation:
    """Runs the loop of `target.py` to its end, from the newest checkpoint in `directory` where it is to be resumed.

    Args:
        target: in place of the recipe's.
        places: the runs' own directories, by name; default: they have one log.
    """
    session = replace(session, recipe=session.recipe.model_copy(update={"target": target}))
    adaptation = Adaptation(begun.tuned, target)
    restore(session, directory, adaptation)
    own = {name: place for name, place in (places or {}).items() if place is not directory}
    for each in (directory, *own.values()):
        session.ranks.first_does(each.open)
    tasks = {task.name: TaskSplits(task, splits) for run in runs for task, splits in run.tasks}
    paths = {name: place.path for name, place in own.items()}
    log = open_log(session, directory, adaptation, target.steps, list(tasks.values()), paths)
    adapt(session, runs, begun.prior, adaptation, log, directory.checkpoints)
    log.close()
    return adaptation


def as_target(source: SourceConfig, steps: int | None = None) -> TargetConfig:
    """What the loop of `target.py` has to know of a source stage's recipe: the same steps, rates and optimizer."""
    shared = {key: getattr(source, key) for key in StageConfig.model_fields}
    warmup = source.warmup_steps
    if steps is not None:  # a shorter part may end before its warm-up would
        shared |= {"steps": steps, "warmup_steps": warmup and min(warmup, steps - 1)}
    rates = {"lr_full": source.lr, "lr_low_rank": source.lr}
    return TargetConfig(**shared, **rates, prior="none", eval_every=source.eval_every)
