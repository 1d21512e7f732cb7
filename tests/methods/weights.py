"""The methods that tune weights, on a tiny model and three rows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bmtpt_ds.data.tokens import TokenRow, collate
from bmtpt_ds.methods.adapter import add_adapters
from bmtpt_ds.methods.bitfit import add_biases
from bmtpt_ds.methods.fine_tuning import free_weights
from bmtpt_ds.methods.lora import add_lora
from bmtpt_ds.model.backbone import Backbone

Method = Callable[[nn.Module], dict[str, nn.Parameter]]
Named = dict[str, torch.Tensor]

CPU = torch.device("cpu")
METHODS = {
    "lora": add_lora,
    "adapter": partial(add_adapters, reduction=4),
    "bitfit": add_biases,
    "fine_tuning": free_weights,
}
ROWS = [
    TokenRow([5, 6, 7, 8, 9, 10, 11, 12, 13, 1], [40, 41, 42, 1]),
    TokenRow([10, 11, 12, 1], [43, 41, 1]),
    TokenRow([13, 14, 1], [42, 1]),
]
PADDED = [ROWS]
BUCKETS = [ROWS[:1], ROWS[1:]]


def no_prompts(backbone: Backbone) -> torch.Tensor:
    return torch.zeros(len(ROWS), 0, backbone.config.d_model, dtype=backbone.dtype)


def losses_of(backbone: Backbone, cut: list[list[TokenRow]] = BUCKETS) -> torch.Tensor:
    return backbone.row_losses(no_prompts(backbone), collate(cut, 0).on(CPU))


def text_of(backbone: Backbone) -> torch.Tensor:
    return backbone.generate_ids(no_prompts(backbone), collate(PADDED, 0).on(CPU)[0], 6)


def moved(parameters: Named, scale: float = 0.05) -> None:
    """Away from where they begin: B of LoRA and the biases are 0 there, and with them some gradients."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in parameters.values():
            value += scale * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype)


def gradients_of(loss: torch.Tensor, parameters: Named) -> Named:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
