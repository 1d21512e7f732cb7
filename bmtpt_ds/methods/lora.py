"""LoRA: W x + (alpha / r) B A x in the place of W x, at the queries and values of all attention; A and B are trained.

A [r, in] is random and B [out, r] zero, so that nothing changes at first. Hu et al. 2021, "LoRA: Low-Rank Adaptation of
Large Language Models", adapt W_q and W_v; the layers are PEFT's, hence the names `...q.lora_A.default.weight`.

ATTEMPT trains what it compares prompts with by AdamW at learning rate 3e-4, 500 warm-up steps, batches of 32.
"""

import torch
from torch import nn

from bmtpt_ds.errors import UserError
from bmtpt_ds.methods.weights import Parameters, tuning
from bmtpt_ds.model.frozen import train_only, use_trainable_layers
from bmtpt_ds.session import Session


def add_lora(backbone: nn.Module, *, rank: int = 8, alpha: float = 16, seed: int = 0) -> dict[str, nn.Parameter]:
    """Adds the factors to a T5, in place; they alone are trained.

    The weights W are called `...q.base_layer.weight` from then on.

    Args:
        seed: of A, in whatever dtype and on whatever device the weights are; torch's own generators are not touched.

    Returns:
        A [rank, H] and B [heads * d, rank] of each layer, by their names, in the order of the model; 884,736 values at
        T5-base and rank 8.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        if error.name != "peft":  # it is there, something that it needs is not
            raise
        raise UserError("method lora needs peft: pip install peft") from None
    use_trainable_layers(backbone)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q", "v"], lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, then moves to where W is
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's generators as well
        inject_adapter_in_model(config, backbone)
    return train_only(backbone, lambda name: ".lora_" in name)


def tune(session: Session) -> Parameters:
    """As the recipe says."""
    weights = session.recipe.weights
    return add_lora(session.model.backbone, rank=weights.rank, alpha=weights.alpha, seed=session.recipe.run.seed)


begin, reader = tuning(tune)
