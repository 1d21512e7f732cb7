"""The formulas of operations are what torch counts while the passes run."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bmtpt_ds.data.tokens import Batch
from bmtpt_ds.model.backbone import Backbone, checkpoint_activations
from bmtpt_ds.model.flops import Flops, row_flops
from tests.model.test_footprint import SIZES, architecture_of, make

ROWS, PROMPT, SOURCE = 2, 9, 23


def counted(backbone: Backbone, target: int) -> Flops:
    """What torch counts, fused attention aside: its products are counted as the formulas have them."""
    batch = Batch(torch.randint(3, 60, (ROWS, SOURCE)), None, torch.randint(3, 60, (ROWS, target)))
    prompts = torch.randn(ROWS, PROMPT, backbone.config.d_model, requires_grad=True)
    backbone.train(backbone.train_while_tuning)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = backbone.row_losses(prompts, [batch]).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("target", [2, 12], ids=["few targets", "many targets"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equal_to_what_torch_counts(sizes: dict, target: int, tmp_path: Path) -> None:
    config, backbone = make(sizes, torch.float32)
    row = {"source_tokens": PROMPT + SOURCE, "target_tokens": target, "on_cpu": True}
    flops = row_flops(architecture_of(config, tmp_path), **row)
    forward, backward = counted(backbone, target)
    assert ROWS * flops.forward == forward
    assert ROWS * flops.backward == backward
    assert flops.recompute == 0
    assert flops.model == flops.total


def test_recomputing_is_the_blocks_forward_pass_again(tmp_path: Path) -> None:
    config, backbone = make(SIZES["narrow"], torch.float32)
    checkpoint_activations(backbone)
    row = {"source_tokens": PROMPT + SOURCE, "target_tokens": 2, "on_cpu": True}
    flops = row_flops(architecture_of(config, tmp_path), checkpointing=True, **row)
    forward, backward = counted(backbone, 2)
    assert ROWS * flops.forward == forward
    # torch's checkpoint stops before what nothing needs: the last product of each block
    assert ROWS * (flops.backward + flops.recompute) == pytest.approx(backward, rel=0.15)
    assert flops.recompute < flops.forward


def test_a_gpu_makes_keys_and_values_of_all_encoder_tokens(tmp_path: Path) -> None:
    architecture = architecture_of(make(SIZES["narrow"], torch.float32)[0], tmp_path)
    gpu, cpu = (row_flops(architecture, 300, 2, on_cpu=on_cpu) for on_cpu in (False, True))
    made = architecture.decoder_blocks * 2 * 2 * 300 * architecture.hidden_size * architecture.inner_size
    assert gpu.forward - cpu.forward == pytest.approx(made, rel=0.2)
    many = [row_flops(architecture, 300, 64, on_cpu=on_cpu) for on_cpu in (False, True)]
    assert many[0] == many[1]
