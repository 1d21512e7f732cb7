"""AdamW and SGD as functions of tensors: the state comes in and goes out, and the host waits for nothing."""

import torch
from torch import Tensor


def adam(
    values: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The moved values and the new moments; the order of operations is torch.optim.AdamW's, after its weight decay.

    Args:
        step: which step this is, from 1; 0-d, or of a shape that broadcasts where parts have taken different numbers.
    """
    beta1, beta2 = betas
    exp_avg = torch.lerp(exp_avg, gradient, 1 - beta1)
    exp_avg_sq = (exp_avg_sq * beta2).addcmul(gradient, gradient, value=1 - beta2)
    step = step.double()  # 1 - beta2**step keeps its digits
    rate = (lr / (1 - beta1**step)).to(values.dtype)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step).sqrt().to(values.dtype) + eps
    return values.addcdiv(exp_avg * -rate, denominator), exp_avg, exp_avg_sq


def clip_factor(gradients: list[Tensor], most: float) -> Tensor:
    """What scales the gradients of each run down to a joint norm of `most`, [R]; 1 where they are below it.

    Args:
        gradients: [R, ...] each. As torch.nn.utils.clip_grad_norm_ does for one run.
    """
    norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
    return (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
