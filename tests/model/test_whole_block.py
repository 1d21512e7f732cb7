"""Blocks as one node of autograd give what the layers give, in a run's own pass: losses and gradients."""

import pytest
import torch

pytest.importorskip("triton")

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import TokenRow, collate
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.model import frozen
from bmtpt_ds.model.whole_block import SideBySide
from bmtpt_ds.parallel import Ranks, load_backbone
from bmtpt_ds.phases import Phases
from tests.one_step import gradient_of_rows

# behind a prompt of 10: two tiles of 64, and with those beside them a bucket that is padded, and one that is not
ROWS = [TokenRow([7] * 5, [4, 1]), TokenRow([9] * 60, [5, 6, 1]), TokenRow([6] * 59, [1])]


@pytest.fixture(params=["tied", "untied"])  # ReLU, and gated GELU
def folder(request, tied_model, untied_model):
    return tied_model if request.param == "tied" else untied_model


def gradient(folder, *, layout="resident", recomputed=False, dtype="float32", wide=False):
    ranks = Ranks(timeout=60)
    config = ModelConfig(
        name_or_path=str(folder), max_source_length=128, activation_checkpointing=recomputed, dtype=dtype
    )
    model = load_backbone(ranks, config, deepspeed_json.load(layout))
    if wide:
        model.backbone.double()
    prompts = torch.randn(2, 10, model.hidden_size, generator=torch.Generator().manual_seed(0)).to(ranks.device)
    passes = GradientPass(model, 0, 10_000, 0, Phases(ranks.device))
    found = gradient_of_rows(passes, prompts, ROWS)
    if passes.captures:  # as CUDA graphs, and ever after
        assert not (recomputed or wide or layout != "resident")
        again = [gradient_of_rows(passes, prompts, ROWS) for _ in range(2)]
        assert all(torch.equal(one.gradient, found.gradient) for one in again)
        assert passes.captured == 1
    return found.gradient.double().cpu(), found.losses.double().cpu()


def differs(found, right):
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, right, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="by Triton's interpreter, on a machine without a GPU")
@pytest.mark.parametrize(
    ("folder", "layout", "recomputed"),
    [
        *(("tied", "zero3_cpu", True), ("untied", "resident", False)),
        pytest.param("tied", "resident", False, marks=pytest.mark.slow),
        pytest.param("untied", "zero3_cpu", True, marks=pytest.mark.slow),
    ],
    indirect=["folder"],
)
def test_same_as_layer_by_layer(folder, layout, recomputed, monkeypatch):
    right = gradient(folder)
    ran = []
    run_whole = frozen.run_whole
    monkeypatch.setattr(frozen, "run_whole", lambda *arguments: ran.append(1) or run_whole(*arguments))
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})
    moved, join = [], SideBySide._join
    monkeypatch.setattr(SideBySide, "_join", lambda joint: moved.append(joint) or join(joint))
    found = gradient(folder, layout=layout, recomputed=recomputed)
    assert ran
    # once in the model's life; what ZeRO-3 gathers is in one piece already
    joint = 0 if layout == "zero3_cpu" else 2 + 2 * 2 + (4 if "untied" in folder.name else 0)
    assert len(moved) == joint
    assert differs(found, right) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="by Triton's interpreter, on a machine without a GPU")
def test_padded_rows_too(tied_model, monkeypatch):
    """As methods read them whose prompts follow from the rows."""
    model = load_backbone(Ranks(timeout=60), ModelConfig(name_or_path=str(tied_model)), deepspeed_json.load("resident"))
    batches = collate([[ROWS[1], ROWS[2]], [ROWS[0]]], 0).on(model.ranks.device)

    def losses_and_gradient():
        prompts = torch.randn(3, 10, model.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        losses = model.backbone.row_losses(prompts, batches)
        losses.sum().backward()
        return prompts.grad, losses.detach()

    right = losses_and_gradient()
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})
    assert differs(losses_and_gradient(), right) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("layout", ["resident", "zero3", "zero3_offload"])  # the last gathers, on a stream of its own
def test_on_a_gpu_as_near_to_float64_as_layer_by_layer_and_always_the_same(folder, layout, recomputed, monkeypatch):
    right = gradient(folder, wide=True)
    found = gradient(folder, layout=layout, recomputed=recomputed, dtype="bfloat16")
    again = gradient(folder, layout=layout, recomputed=recomputed, dtype="bfloat16")
    assert all(map(torch.equal, found, again))
    monkeypatch.setattr(frozen, "WHOLE", set())
    layers = gradient(folder, dtype="bfloat16")
    assert differs(found, right) < 1.5 * differs(layers, right)


def test_weights_side_by_side_are_one_matrix_and_stay_themselves():
    layers = [torch.nn.Linear(3, rows, bias=False).requires_grad_(False) for rows in (4, 2, 5)]
    before = [layer.weight.clone() for layer in layers]
    joint = SideBySide(*layers)
    for _ in range(2):
        matrix = joint.weight
        assert torch.equal(matrix, torch.cat(before))
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
        assert matrix.data_ptr() == layers[0].weight.data_ptr()
    layers[1].weight.fill_(7.0)
    assert (matrix[4:6] == 7.0).all()
    layers[1].double()
    layers[1].float()  # elsewhere in memory, as after `to`
    assert torch.equal(joint.weight, torch.cat([layer.weight for layer in layers]))


def test_weights_that_are_trained_go_through_the_layers(folder):
    from bmtpt_ds.model.frozen import use_trainable_layers

    model = load_backbone(
        Ranks(timeout=60), ModelConfig(name_or_path=str(folder)), deepspeed_json.load("resident")
    ).backbone
    assert all("forward" in vars(block) for block in model.encoder.block)
    use_trainable_layers(model)
    assert not any("forward" in vars(block) for block in [*model.encoder.block, *model.decoder.block])
