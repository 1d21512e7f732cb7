"""The footprint of an architecture is what autograd saves and what the model's parameters take."""

from pathlib import Path

import pytest
import torch
from transformers import T5Config

from bmtpt_ds.data.tokens import Batch
from bmtpt_ds.model.backbone import Backbone, build_backbone, checkpoint_activations
from bmtpt_ds.model.footprint import kept_bytes, row_bytes, weight_bytes
from bmtpt_ds.model.packed import ATTENTION
from bmtpt_ds.model.shapes import architecture_by_name
from bmtpt_ds.model_folder import Architecture, read_architecture

ROWS, PROMPT, SOURCE, TARGET = 3, 9, 16, 6
SIZES = {
    "narrow": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2},
    "wide feed-forward": {"d_model": 48, "d_kv": 16, "num_heads": 6, "d_ff": 320, "num_layers": 3},
    "gated, few decoder blocks": {
        "d_model": 64, "d_kv": 16, "num_heads": 3, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 2,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def architecture_of(config: T5Config, folder: Path) -> Architecture:
    config.save_pretrained(folder)
    return read_architecture(folder)


def make(sizes: dict, dtype: torch.dtype) -> tuple[T5Config, Backbone]:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    config._attn_implementation = ATTENTION
    backbone = build_backbone(config, dtype=dtype, own_head=True)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return config, backbone


def saved_bytes(backbone: Backbone) -> int:
    """Of the storages that a forward pass of some padded rows leaves to its backward pass, each once, weights not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # kept alive: no other can come to lie there
        return tensor

    mask = torch.ones(ROWS, SOURCE, dtype=torch.long)
    mask[0, -1] = 0
    batch = Batch(torch.randint(3, 60, (ROWS, SOURCE)), mask, torch.randint(3, 60, (ROWS, TARGET)))
    prompts = torch.randn(ROWS, PROMPT, backbone.config.d_model, requires_grad=True)
    backbone.train(backbone.train_while_tuning)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.row_losses(prompts, [batch])
    return sum(storage.nbytes() for storage in saved.values())


def estimate(config: T5Config, folder: Path, dtype: torch.dtype, *, checkpointing: bool) -> int:
    return ROWS * kept_bytes(
        architecture_of(config, folder),
        bytes_per_value=dtype.itemsize,
        checkpointing=checkpointing,
        source_tokens=PROMPT + SOURCE,
        target_tokens=TARGET,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_what_autograd_saves(sizes: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    config, backbone = make(sizes, dtype)
    assert estimate(config, tmp_path, dtype, checkpointing=False) == pytest.approx(saved_bytes(backbone), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_what_autograd_saves_with_checkpointing(sizes: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    """The blocks' inputs, and while its backward pass runs the greatest block: what one more of it adds.

    The position bias too, which lives in what the recomputation closes over, where autograd's hooks do not see it.
    """
    config, whole = make(sizes, dtype)
    blocks = []
    for more in ({"num_layers": config.num_layers + 1}, {"num_decoder_layers": config.num_decoder_layers + 1}):
        counts = {"num_layers": config.num_layers, "num_decoder_layers": config.num_decoder_layers}
        blocks.append(saved_bytes(make(sizes | counts | more, dtype)[1]) - saved_bytes(whole))
    checkpoint_activations(whole)
    bias = ROWS * config.num_heads * (PROMPT + SOURCE) * (-(-(PROMPT + SOURCE) // 16) * 16) * dtype.itemsize
    right = saved_bytes(whole) + max(blocks) + bias
    assert estimate(config, tmp_path, dtype, checkpointing=True) == pytest.approx(right, rel=0.15)


def test_source_stage_of_t5_3b_stays_under_24_gigabytes() -> None:
    """M = 5, kappa = 3, prompt 100, rows of 256 tokens, bfloat16, checkpointing: on one GPU, even all rows at once."""
    M, kappa, size = 5, 3, 2
    architecture = architecture_by_name("t5-3b")
    weights = weight_bytes(architecture, size)
    # what ZeRO-3 gathers at a time: the block at work and the next, each with its copy in flight, the embedding
    gathered = (4 * architecture.block_parameters + architecture.embedding_parameters) * size
    row = {"bytes_per_value": size, "source_tokens": 100 + 256, "target_tokens": 32}
    activations = M * kappa * row_bytes(architecture, checkpointing=True, **row)
    particles = 5 * M * 100 * architecture.hidden_size * 4  # with gradients, two moments, a copy
    assert 5.5e9 < weights < 6e9
    assert weights + gathered + activations + particles < 24e9
    assert activations < 0.2 * M * kappa * row_bytes(architecture, checkpointing=False, **row)  # worth it
