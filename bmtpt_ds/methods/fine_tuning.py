"""Full fine-tuning: every weight of the model is trained, argmin_W -log p(y | x; W) from the pretrained W.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer".

ATTEMPT's defaults (attempt/configs/baselines/finetuning.json): AdamW at learning rate 3e-4, 500 warm-up steps, batches
of 32.
"""

from torch import nn

from bmtpt_ds.methods.weights import Parameters, tuning
from bmtpt_ds.model.frozen import train_only, use_trainable_layers
from bmtpt_ds.session import Session


def free_weights(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Makes all parameters of a T5 trained ones, in place.

    Returns:
        Each parameter once, under its first name (`shared.weight` where it is the head's too), in the order of the
        model; 222,903,552 values at T5-base.
    """
    use_trainable_layers(backbone)
    return train_only(backbone, lambda name: True)


def tune(session: Session) -> Parameters:
    """As every recipe says."""
    return free_weights(session.model.backbone)


begin, reader = tuning(tune)
