"""Passes over a table: the gradients of the padded ones, and on a GPU the same whether they are captured or not."""

import json

import pytest
import torch

pytest.importorskip("triton")

from bmtpt_ds import losses
from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.model import frozen
from bmtpt_ds.model.packed_pass import PackedPass, PackedPasses, can_pack
from bmtpt_ds.parallel import Ranks, load_backbone
from bmtpt_ds.phases import Phases
from tests import toy
from tests.one_step import gradient_of_rows

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")


def row(source, target):
    return TokenRow([3 + (7 * i) % 50 for i in range(source)], [3 + i % 40 for i in range(target)])


SHORT = [row(5, 2), row(60, 3), row(59, 1)]
CASES = {
    "all prompts read all": {"rows": SHORT},
    "rows of their own": {"rows": SHORT, "prompt_of": [1, 0, 1]},
    "a prompt without rows": {"rows": SHORT, "prompt_of": [1, 1, 1]},
    "long answers": {"rows": [row(9, 20), row(30, 2)]},
    "several passes": {"rows": SHORT, "max_tokens": 170},
}
SLOW = {"rows of their own"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """For the interpreter, to which every head of every layer is a program more."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": 96, "d_model": 16, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 1}
    toy.write_model(folder, own_head=False, **sizes)
    return folder


def load(folder, dtype="float32"):
    config = ModelConfig(name_or_path=str(folder), max_source_length=128, activation_checkpointing=False, dtype=dtype)
    return load_backbone(Ranks(timeout=60), config, deepspeed_json.load("resident"))


def prompts_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 10, model.hidden_size, generator=generator).to(model.ranks.device)


def passes_of(model, max_tokens=10_000, **options):
    return GradientPass(model, 0, max_tokens, 0, Phases(model.ranks.device), **options)


def gradient(model, rows, prompt_of=None, max_tokens=10_000):
    found = gradient_of_rows(passes_of(model, max_tokens), prompts_of(model), rows, prompt_of=prompt_of)
    return found.gradient, found.losses


@pytest.mark.skipif(ON_GPU, reason="by Triton's interpreter, on a machine without a GPU")
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()]
)
def test_gradients_are_those_of_padded_passes(case, small, monkeypatch):
    model = load(small)
    right = gradient(model, **case)
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})
    ran, forward = [], PackedPass.forward
    monkeypatch.setattr(PackedPass, "forward", lambda *arguments: ran.append(1) or forward(*arguments))
    found = gradient(model, **case)
    assert len(ran) > 1 if "max_tokens" in case else len(ran) == 1
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(ON_GPU, reason="by Triton's interpreter, on a machine without a GPU")
def test_what_keeps_a_model_from_it(small, monkeypatch):
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})

    def packs(model):
        (own,) = passes_of(model).prepare(losses.StepRows.evenly(SHORT[:1]), 2, 10).passes
        return own.table is not None

    model = load(small)
    assert packs(model)
    model.backbone.config.dropout_rate = 0.1
    assert not packs(model)
    model.backbone.config.dropout_rate = 0.0
    model.backbone.double()
    assert not packs(model)


@pytest.mark.parametrize("json_name", ["resident", "zero3_cpu"])
def test_blocks_that_cannot_run_whole_take_padded_passes(json_name, tmp_path, monkeypatch):
    """flan-ul2's gate is SiLU. Under ZeRO-3 every block has a forward of its own, which says nothing of that."""
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})
    toy.make_model(tmp_path, own_head=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(values | {"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"})
    )
    model = load_backbone(Ranks(timeout=60), ModelConfig(name_or_path=str(tmp_path)), deepspeed_json.load(json_name))
    assert not can_pack(model.backbone, torch.device("cpu"))


STEPS = [SHORT, SHORT[:1], SHORT[::-1], [row(200, 3), row(20, 2)], SHORT, SHORT[:1], [row(199, 2), row(21, 3)]]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_captured_passes_are_the_same_to_the_bit(name, request):
    """Rows of several sizes, a larger one in between, sizes that come again with other rows."""
    model = load(request.getfixturevalue(f"{name}_model"), "bfloat16")
    captured, plain = passes_of(model), passes_of(model, cuda_graphs=False)
    for step, rows in enumerate(STEPS):
        prompts = prompts_of(model, step)
        one, other = (gradient_of_rows(of, prompts, rows, step + 1) for of in (captured, plain))
        assert torch.equal(one.gradient, other.gradient)
        assert torch.equal(one.losses, other.losses)
        assert one.finite
    assert all(own._graphs for own in captured._packed._passes.values())
    assert not any(own._graphs for own in plain._packed._passes.values())


@needs_gpu
@pytest.mark.gpu
def test_where_memory_is_short_graphs_go_first_and_then_rows_at_once(tied_model, monkeypatch):
    model = load(tied_model, "bfloat16")
    of, prompts = passes_of(model, max_tokens=400), prompts_of(model)
    right = {len(rows): gradient_of_rows(of, prompts, rows).gradient.clone() for rows in (SHORT, SHORT, SHORT[:1])}
    backward, failures = PackedPass._backward, []

    def short_of_memory(own):
        if failures:
            failures.pop()
            torch.empty(1 << 50, device="cuda")
        backward(own)

    monkeypatch.setattr(PackedPass, "_backward", short_of_memory)
    failures.append(1)
    found = gradient_of_rows(of, prompts, [row(100, 9)], 4)  # a size not seen yet, beside graphs
    assert found.finite
    assert not failures
    assert of.max_tokens == 400
    failures.append(1)
    found = gradient_of_rows(of, prompts, SHORT, 5)  # the largest, which is captured before all others
    assert 100 < of.max_tokens < 200  # half of what the pass had
    torch.testing.assert_close(found.gradient, right[3], rtol=2e-2, atol=1e-3)


@needs_gpu
@pytest.mark.gpu
def test_few_launches_and_no_waiting(tied_model):
    from tests.gpu.test_step import no_waiting

    model = load(tied_model, "bfloat16")
    of, prompts = passes_of(model), prompts_of(model)
    works = [of.prepare(losses.StepRows.evenly(rows), 2, 10) for rows in (SHORT, SHORT, SHORT[::-1])]
    stop = losses.StopSignal()
    for work in works[:2]:
        of(losses.Prompts(prompts), work, 1, stop)
    with no_waiting():
        of(losses.Prompts(prompts), works[2], 3, stop)


@pytest.mark.skipif(ON_GPU, reason="by Triton's interpreter, on a machine without a GPU")
def test_only_so_many_sizes_are_kept(small, monkeypatch):
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})
    monkeypatch.setattr("bmtpt_ds.model.packed_pass._MOST", 2)
    of = passes_of(load(small))
    sizes = []
    for step, tokens in enumerate((3, 12, 30)):
        work = of.prepare(losses.StepRows.evenly([row(tokens, 2)]), 2, 10)
        sizes.append(work.passes[0].table.sizes)
        of(losses.Prompts(prompts_of(of._model)), work, step + 1, losses.StopSignal())
    assert isinstance(of._packed, PackedPasses)
    assert list(of._packed._passes) == sizes[1:]
