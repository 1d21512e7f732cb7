"""Which weights a folder holds, without loading the model."""

from pathlib import Path

import torch

from bmtpt_ds.model.backbone import build_backbone, read_config
from bmtpt_ds.model.weights import CheckpointReader, WeightsIdentity


def weights_digest(folder: Path) -> str:
    """The digest that a run has of the same checkpoint (`Sharded.weights`); memory for one tensor at a time.

    Raises:
        UserError: a damaged checkpoint, or one of another architecture than its config.json says.
    """
    reader, identity = CheckpointReader(folder), WeightsIdentity()
    config = read_config(folder, dropout=0.0)
    no_memory = torch.device("meta")
    backbone = build_backbone(config, dtype=torch.float32, own_head=reader.has_own_head(), building=no_memory)
    for name, parameter in backbone.named_parameters():
        identity.add(name, reader.read_shaped(name, tuple(parameter.shape)))
    return identity.hexdigest()
