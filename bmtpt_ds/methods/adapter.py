"""Adapters: x + W_up gelu(W_down x + b_down) + b_up behind self-attention and feed-forward, before the residual sum.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP". On T5 as in Compacter, ATTEMPT and MPT: in every
block of encoder and decoder, none behind attention over the encoder; gelu is the tanh approximation (`gelu_new`);
weights begin at N(0, 0.01^2), biases at 0; all layer norms of T5 are trained too.

ATTEMPT's defaults (attempt/configs/baselines/adapter.json): bottleneck H // 32, AdamW at learning rate 3e-4, 500
warm-up steps, batches of 32.
"""

import torch
from torch import nn
from torch.nn.functional import gelu
from torch.nn.utils import skip_init
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseActDense, T5DenseGatedActDense

from bmtpt_ds.errors import UserError
from bmtpt_ds.methods.weights import Parameters, tuning
from bmtpt_ds.model.frozen import train_only, use_trainable_layers
from bmtpt_ds.session import Session

_STD = 0.01


def add_adapters(backbone: nn.Module, *, reduction: int = 32, seed: int = 0) -> dict[str, nn.Parameter]:
    """Adds adapters to a T5, in place; they and the layer norms alone are trained.

    Args:
        reduction: how many times narrower than H the bottleneck is.
        seed: of the weights, in whatever dtype and on whatever device the model is; torch's own generators are not
            touched.

    Returns:
        W_down [H // reduction, H], b_down, W_up [H, H // reduction], b_up of each adapter and the norms' weights [H],
        by their names, in the order of the model; 1,855,104 values at T5-base.

    Raises:
        UserError: no bottleneck is left.
    """
    hidden = backbone.config.d_model
    if hidden < reduction:
        raise UserError(f"method adapter: a bottleneck of {hidden} // {reduction} = 0; reduce by {hidden} at most")
    use_trainable_layers(backbone)
    draw = torch.Generator().manual_seed(seed)
    for module in list(backbone.modules()):
        if isinstance(module, T5Attention) and module.is_causal == module.is_decoder:  # not the one over the encoder
            _adapt(module.o, hidden // reduction, draw)
        elif isinstance(module, T5DenseActDense | T5DenseGatedActDense):
            _adapt(module.wo, hidden // reduction, draw)
    return train_only(backbone, lambda name: ".adapter." in name or "layer_norm." in name)


def _adapt(last: nn.Linear, width: int, draw: torch.Generator) -> None:
    """Puts an adapter behind the last layer of attention or feed-forward."""
    last.__class__ = AdaptedLinear
    last.adapter = Bottleneck(last.weight, width, draw)


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter behind it."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.adapter(super().forward(states))


class Bottleneck(nn.Module):
    """One adapter, [..., H] -> [..., H]."""

    def __init__(self, like: torch.Tensor, width: int, draw: torch.Generator):
        """
        Args:
            like: [H, ...], gives dtype and device.
        """
        super().__init__()
        place = {"device": like.device, "dtype": like.dtype}
        self.down = skip_init(nn.Linear, len(like), width, **place)  # else drawn from torch's own generator
        self.up = skip_init(nn.Linear, width, len(like), **place)
        with torch.no_grad():
            for layer in (self.down, self.up):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw, dtype=torch.float32) * _STD)
                layer.bias.zero_()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.up(gelu(self.down(states), approximate="tanh"))


def tune(session: Session) -> Parameters:
    """As the recipe says."""
    recipe = session.recipe
    return add_adapters(session.model.backbone, reduction=recipe.weights.reduction, seed=recipe.run.seed)


begin, reader = tuning(tune)
