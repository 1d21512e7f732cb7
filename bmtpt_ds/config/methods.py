"""The methods that `method` names, what a command has to know of each, and the sections of those with options.

Equations, sources and defaults stand at the methods themselves, in `bmtpt_ds/methods/`. Nothing here imports torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from bmtpt_ds.config.values import Section

Name = Literal[
    "bmtpt",
    "prompt_tuning",
    "vanilla_transfer",
    "spot",
    "attempt",
    "mpt",
    "lora",
    "adapter",
    "bitfit",
    "fine_tuning",
]

TUNES_WEIGHTS = ("lora", "adapter", "bitfit", "fine_tuning")  # in place of a prompt
WITHOUT_SOURCE = ("prompt_tuning", *TUNES_WEIGHTS)
# what the source stage of a method leaves: methods of one kind can take each other's
SOURCE_KIND = {
    "bmtpt": "particles",
    "vanilla_transfer": "particles",
    "spot": "a prompt a task",
    "attempt": "a prompt a task",
    "mpt": "decomposed prompts",
    "peft": "particles",  # what `bmtpt import` makes of PEFT's prompts
}
# sections of a recipe that only these methods look at
OF_ONE_METHOD = {"spot": ("spot",), "attempt": ("attempt",), "mpt": ("mpt",), "weights": TUNES_WEIGHTS}

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]


class SpotConfig(Section):
    """SPoT: which source prompt a target task's begins at."""

    # of the target prompt that is compared with the sources'; default: a tenth of target.steps
    probe_steps: _Count | None = None
    # of prompts: cosine of their mean tokens, or the mean of the cosines of all pairs of tokens
    similarity: Literal["average", "per_token"] = "average"


class AttemptConfig(Section):
    """ATTEMPT: the attention over source prompts."""

    bottleneck: _Count = 100  # r
    temperature: _Positive | Literal["auto"] = "auto"  # auto: e times the hidden size
    lr: _Positive = 0.1  # of the attention; the prompt's is target.lr_full


class MptConfig(Section):
    """MPT: the source stage's two parts."""

    distillation: Annotated[float, Field(ge=0)] = 0.9  # lambda, weight of what the teachers say; 0: no teachers
    teacher_steps: _Count | None = None  # of the prompts that teach, one a task; default: source.steps


class WeightsConfig(Section):
    """LoRA, adapters, BitFit, fine-tuning: what is tuned of the backbone."""

    lr: _Positive = 3e-4  # in place of target.lr_full
    rank: _Count = 8  # LoRA's
    alpha: _Positive = 16  # LoRA's, over rank the factor of its update
    reduction: _Count = 32  # hidden size over an adapter's bottleneck
