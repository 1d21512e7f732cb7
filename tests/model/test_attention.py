"""The kernels of packed attention: against float64, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bmtpt_ds.model.attention import Tiling, attend, attend_gradient
from bmtpt_ds.model.packed import Span

HEADS = 2
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE, OF_GRADIENTS = (1e-2, 5e-2) if ON_GPU else (1e-5, 2e-5)


def mask_of(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long().to(DEVICE)


def position(queries, keys, *, causal=False):
    bias = 3 * torch.randn(1, HEADS, queries, keys, generator=torch.Generator().manual_seed(5))
    if causal:
        bias = bias.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), torch.finfo(DTYPE).min)
    return bias.to(DEVICE, DTYPE)


def cases():
    """Spans by name: tiles that are full, begun and several; padding; texts that do not see each other."""
    long = position(150, 160)
    yield "one token", [Span(1, 1, 1, position(1, 16))]
    yield "encoder", [Span(2, 150, 150, long), Span(3, 64, 64, long), Span(1, 5, 5, long)]
    yield "padded", [Span(2, 70, 70, long, mask_of([70, 3], 70)), Span(1, 20, 20, long)]
    yield "decoder", [Span(2, 7, 7, position(9, 16, causal=True)), Span(1, 9, 9, position(9, 16, causal=True))]
    yield "choices", [Span(3, 12, 12, position(4, 16, causal=True), texts=3)]
    yield "long decoder", [Span(1, 130, 130, position(130, 144, causal=True))]
    yield "cross", [Span(2, 3, 150), Span(3, 1, 65, mask=mask_of([65, 64, 1], 65))]
    yield "long answers", [Span(1, 40, 30, mask=mask_of([17], 30))]


def exact(query, key, value, spans, scale):
    """Attention a row and a head at a time."""
    found, q, k = [], 0, 0
    for span in spans:
        for row in range(span.rows):
            queries, keys = span.queries // span.texts, span.keys // span.texts
            for _ in range(span.texts):
                seen = keys if span.mask is None else int(span.mask[row].sum())
                part = [
                    states[first : first + tokens].unflatten(1, (HEADS, -1)).transpose(0, 1)
                    for states, first, tokens in ((query, q, queries), (key, k, seen), (value, k, seen))
                ]
                scores = scale * part[0] @ part[1].mT
                if span.position is not None:
                    scores = scores + span.position[0, :, :queries, :seen].double()
                found.append((scores.softmax(dim=-1) @ part[2]).transpose(0, 1).flatten(1))
                q, k = q + queries, k + keys
    return torch.cat(found)


def error(found, right):
    return ((found.double() - right).norm() / right.norm()).item()


def wider(states):
    """The same, as columns of one tensor each for the query and for key and value."""
    query, key, value = states
    return [torch.cat([query, query], dim=1)[:, : query.shape[1]], *torch.cat([key, value], dim=1).chunk(2, dim=1)]


@pytest.mark.parametrize(("d", "apart"), [(8, False), (64, True)])
@pytest.mark.parametrize(("name", "spans"), list(cases()), ids=[name for name, _ in cases()])
def test_values_and_gradients(name, spans, d, apart):
    sizes = [sum(getattr(span, of) * span.rows for span in spans) for of in ("queries", "keys", "keys", "queries")]
    generator, scale = torch.Generator().manual_seed(0), 1.0 if d == 8 else d**-0.5
    states = [torch.randn(size, HEADS * d, generator=generator).to(DEVICE, DTYPE) for size in sizes]
    *leaves, gradient = [tensor.double() for tensor in states]
    for leaf in leaves:
        leaf.requires_grad_()
    right = exact(*leaves, spans, scale)
    right.backward(gradient)

    tiling = Tiling.of(spans, DEVICE, heads=HEADS, d=d, scale=scale)
    tables = (tiling.arguments["rows_ptr"], tiling.arguments["seen_ptr"], tiling.query_tiles, tiling.key_tiles)
    assert all(table.data_ptr() % 16 == 0 for table in tables)
    wide = wider(states[:3]) if apart else states[:3]
    out, sums = attend(*wide, tiling)
    assert error(out, right.detach()) < TOLERANCE

    def of_states():
        into = [torch.full_like(one, float("nan")) for one in states[:3]]
        into = wider(into) if apart else into
        attend_gradient(states[3], *wide, out, sums, tiling, into=into)
        return into

    gradients = of_states()
    for found, leaf in zip(gradients, leaves, strict=True):
        if leaf.grad.norm() > 1e-9:  # a single key has all the weight, whatever its score
            assert error(found, leaf.grad) < OF_GRADIENTS
        assert found.isfinite().all()
    assert all(map(torch.equal, gradients, of_states()))


def test_a_later_layer_gives_the_compiled_kernel_what_the_first_gave():
    """The kernels are compiled; a stand-in for CUDA's driver writes down what it is given."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.launched_attention"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    first, second, unaligned = lines[:3], lines[3:6], lines[6:]
    assert [line.pop("asked") for line in lines] == [True] * 3 + [False] * 3 + [True] * 3
    assert [line["kernel"] for line in first] == ["forward_kernel", "queries_kernel", "keys_kernel"]
    assert [line["given"][0] for line in first] == ["state 0"] * 3
    assert second == first
    assert unaligned == first


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [
        (90, "128"),  # the more registers
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((90, "64"), (80, "64 128"), (100, "64"), (120, "64"))
        ),
    ],
)
def test_compiles_with_hardly_a_spill(capability, sizes, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.model.compiled_attention", str(capability), *sizes.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 6 * len(sizes.split())
    for case in found:
        spills = case["kernel"] == "keys_kernel" and case["d"] > 64  # four warps are faster all the same
        assert case["stack"] <= (32 if spills else 0), case
        assert case["shared"] <= (227 if capability in (90, 100) else 99) * 1024, case
        assert case["float_atomics"] == 0, case
