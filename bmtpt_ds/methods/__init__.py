"""The methods of the paper's tables, a file each, behind the same commands: `method:` in the recipe names one.

A method's `learn` is its source stage, its `begin` says what the target stage trains and where that begins; the loops
are those of `source.py` and `target.py`. HyperFormer and HyperDecoder are not here: the reports quote their figures.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import get_args

import torch

from bmtpt_ds.checkpoint import Stored
from bmtpt_ds.config.methods import Name
from bmtpt_ds.model.backbone import RowPrompts
from bmtpt_ds.prompt_files import prompt_for
from bmtpt_ds.session import Session


def method(name: str) -> ModuleType:
    """The module of a method: `begin(AdaptJob) -> Begun`; `learn(SourceJob) -> Learned` where it has a source stage;
    `reader(stored, session)` where its runs of `adapt` leave no plain prompts."""
    return import_module(f"bmtpt_ds.methods.{name}")


def reader(stored: Stored, session: Session) -> Callable[[str], torch.Tensor | RowPrompts]:
    """What gives the prompt of each task that a finished run can answer; weights that it has tuned are put in place.

    Raises (when called):
        UserError: the run has no prompt for a task.
    """
    name = stored.state.get("method")
    own = getattr(method(name), "reader", None) if name in get_args(Name) else None  # PEFT's prompts have no method
    if own is not None and "particles" not in stored.tensors:
        return own(stored, session)
    return lambda task: prompt_for(stored, task).to(session.ranks.device)
