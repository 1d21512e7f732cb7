"""The footprint of an architecture is what autograd saves and what the model's parameters take."""

import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config

from bmtpt_ds.data.tokens import Batch
from bmtpt_ds.methods.mpt import Taught
from bmtpt_ds.model.backbone import Backbone, build_backbone, checkpoint_activations, prepared_config
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


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still there."""

    def __init__(self):
        super().__init__()
        self._bytes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._bytes:
                storage = tensor.untyped_storage()
                self._bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._bytes.pop, storage._cdata)
        self.most = max(self.most, sum(self._bytes.values()))
        return made


@pytest.mark.parametrize("target", [8, 32, 128])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_rows_with_a_teacher_hold(target: int, checkpointing: bool, tmp_path: Path) -> None:
    """At the fullest moment of a step of MPT, a quarter of T5-small in each direction."""
    sizes = {"d_model": 128, "d_kv": 16, "num_heads": 8, "d_ff": 512, "num_layers": 6, "vocab_size": 8032}
    config = prepared_config(T5Config(decoder_start_token_id=0, **sizes), 0.0)
    backbone = build_backbone(config, dtype=torch.float32, own_head=False)
    if checkpointing:
        checkpoint_activations(backbone)
    backbone.train(backbone.train_while_tuning)
    batch = Batch(torch.ones(2, 256, dtype=torch.long), None, torch.ones(2, target, dtype=torch.long))
    students = torch.randn(2, 100, 128, requires_grad=True)
    through, alive = Taught(students, torch.randn(2, 100, 128), 0.9), Alive()
    with alive:
        through.row_losses(backbone, [students], [0, 1], [batch]).sum().backward()
    row = {"bytes_per_value": 4, "source_tokens": 100 + 256, "target_tokens": target, "checkpointing": checkpointing}
    counted = 2 * row_bytes(architecture_of(config, tmp_path), taught=True, **row)
    assert 0.7 < alive.most / counted < 1.4


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
