"""A step's gradient from its rows at once, as tests and benchmarks want it."""

from collections.abc import Sequence

import torch

from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, Prompts, StepGradient
from bmtpt_ds.stopping import StopSignal


def gradient_of_rows(
    gradient_pass: GradientPass,
    prompts: torch.Tensor,  # [P, L, H]
    rows: Sequence[TokenRow],
    step: int = 1,
    prompt_of: Sequence[int] | None = None,
) -> StepGradient:
    work = gradient_pass.prepare(StepRows.evenly(rows, prompt_of), *prompts.shape[:2])
    return gradient_pass(Prompts(prompts), work, step, StopSignal())
