"""BitFit: W x + b in the place of W x, norm(x) + b in the place of norm(x); the biases b alone are trained.

Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models".
T5 has no biases; as in ATTEMPT and MPT all its linear layers, its norms and its head are given one that begins at 0.

ATTEMPT's defaults (attempt/configs/baselines/bitfit.json): AdamW at learning rate 3e-4, 500 warm-up steps, batches of
32; of the head the bias alone.
"""

import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from bmtpt_ds.methods.weights import Parameters, tuning
from bmtpt_ds.model.frozen import train_only, use_trainable_layers
from bmtpt_ds.session import Session


def add_biases(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Adds a bias to each linear layer and norm of a T5, in place; they alone are trained.

    Returns:
        The bias [out] of each layer and [H] of each norm, by their names, in the order of the model; 282,496 values at
        T5-base.
    """
    use_trainable_layers(backbone)
    for module in backbone.modules():
        if isinstance(module, T5LayerNorm):
            module.__class__ = BiasedNorm
        if isinstance(module, nn.Linear | BiasedNorm):
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
    return train_only(backbone, lambda name: name.endswith(".bias"))


class BiasedNorm(T5LayerNorm):
    """T5's norm with a bias."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.bias


def tune(session: Session) -> Parameters:
    """As every recipe says."""
    return add_biases(session.model.backbone)


begin, reader = tuning(tune)
