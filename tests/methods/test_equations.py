"""The prompt methods' equations, written out: ATTEMPT's attention over source prompts, SPoT's similarity and choice."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.config import Recipe
from bmtpt_ds.methods import attempt, spot
from bmtpt_ds.methods.attempt import AttentivePrompts, attend
from bmtpt_ds.methods.job import Begun
from tests.methods.prompts import Part, attentive_prompt, drawn, job

L, H, BOTTLENECK = 4, 6, 3


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return drawn(*shape, seed=seed).double()


def attention_of(runs: int) -> list[torch.Tensor]:
    """Of each run, scale and shift not where they begin."""
    shapes = ((H, BOTTLENECK), (BOTTLENECK, H), (H,), (H,))
    return [double(runs, *shape, seed=10 + i) for i, shape in enumerate(shapes)]


def test_attend_is_the_equation() -> None:
    texts, own, sources = double(4, 5, H), double(4, L, H, seed=1), double(3, L, H, seed=2)
    attention = [tensor[0] for tensor in attention_of(1)]
    found = attend(texts.amax(dim=1), own, sources, attention, 2.0)
    expected = [attentive_prompt(x, p, sources, attention, 2.0) for x, p in zip(texts, own, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_attention_is_between_no_and_all_prompts() -> None:
    """tau far up: the mean of all; far down: P_own and that of the greatest score, which may be P_own again."""
    text, own, sources = double(1, H), double(1, L, H, seed=1), double(3, L, H, seed=2)
    attention = [tensor[0] for tensor in attention_of(1)]
    prompts = torch.cat([sources, own])
    even, sharp = (attend(text, own, sources, attention, tau)[0] for tau in (1e9, 1e-9))
    torch.testing.assert_close(even, own[0] + prompts.mean(dim=0), rtol=1e-6, atol=1e-6)
    assert sum(torch.allclose(sharp, own[0] + prompt) for prompt in prompts) == 1


NUMBERS = [3, 0, 2, 1, 0, 3]  # of two runs of two tasks
LENGTHS = [[5, 2, 4], [1], [3, 3]]  # of the rows of each bucket


def rows_and_buckets() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    """Embedded rows, and the same in buckets, where padding would be the greatest of all."""
    rows, texts, masks = [], [], []
    for lengths in LENGTHS:
        text = torch.full((len(lengths), max(lengths), H), 9.0, dtype=torch.float64)
        mask = torch.zeros(text.shape[:2], dtype=torch.long)
        for i, length in enumerate(lengths):
            rows.append(double(length, H, seed=20 + len(rows)))
            text[i, :length], mask[i, :length] = rows[-1], 1
        texts.append(text)
        masks.append(None if mask.all() else mask)
    return rows, texts, masks


def test_attentive_prompts_are_each_rows_equation() -> None:
    own, sources, attention = double(2, 2, L, H, seed=1), double(3, L, H, seed=2), attention_of(2)
    rows, texts, masks = rows_and_buckets()
    assert [mask is None for mask in masks] == [False, True, True]
    found = AttentivePrompts(own, attention, sources, 2.0, NUMBERS)(texts, masks)
    expected = [
        attentive_prompt(x, own[n // 2, n % 2], sources, [t[n // 2] for t in attention], 2.0)
        for x, n in zip(rows, NUMBERS, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert torch.cdist(found.flatten(1), found.flatten(1)).add(torch.eye(6)).min() > 0.1  # no row stands for another


def test_padding_changes_no_attentive_prompt() -> None:
    own, sources, attention = double(2, 2, L, H, seed=1), double(3, L, H, seed=2), attention_of(2)
    rows, texts, masks = rows_and_buckets()
    prompts = AttentivePrompts(own, attention, sources, 2.0, NUMBERS)
    alone = prompts([row[None] for row in rows], [None] * len(rows))
    torch.testing.assert_close(prompts(texts, masks), alone, rtol=1e-12, atol=1e-12)


def test_rows_that_are_answered_have_the_first_prompt() -> None:
    own, sources, attention = double(2, 2, L, H, seed=1), double(3, L, H, seed=2), attention_of(2)
    rows, texts, masks = rows_and_buckets()
    tuned = attempt.TunedAttention(own, attention, sources, 2.0, 0.1)
    found = tuned.answering(1, 0)(texts, masks)
    expected = [attentive_prompt(x, own[1, 0], sources, [t[1] for t in attention], 2.0) for x in rows]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


# --- SPoT ------------------------------------------------------------------------------------------------------------


def cosine(p: torch.Tensor, q: torch.Tensor) -> float:
    dot, squares = 0.0, [0.0, 0.0]
    for x, y in zip(p.tolist(), q.tolist(), strict=True):
        dot, squares = dot + x * y, [squares[0] + x * x, squares[1] + y * y]
    return dot / math.sqrt(squares[0] * squares[1])


def similarity(probe: torch.Tensor, source: torch.Tensor, kind: str) -> float:
    if kind == "average":
        return cosine(sum(probe) / len(probe), sum(source) / len(source))
    return sum(cosine(p, q) for p in probe for q in source) / (len(probe) * len(source))


@pytest.mark.parametrize("kind", ["average", "per_token"])
def test_similarity_is_its_cosine(kind: str) -> None:
    probe, sources = double(L, H), double(5, L, H, seed=1)
    found = spot.similarity(probe, sources, kind)
    assert found.tolist() == pytest.approx([similarity(probe, source, kind) for source in sources], abs=1e-12)
    assert spot.similarity(probe, 3 * probe[None], "average").item() == pytest.approx(1)


CHOSEN = {"average": [0, 1, 2], "per_token": [3, 0, 1]}  # of four sources, by three probes


def sources_and_probes() -> tuple[torch.Tensor, torch.Tensor]:
    """One long token says where the mean points, the three short ones where most pairs of tokens do."""
    long, short = 20 * drawn(4, 1, 32, seed=1), drawn(4, 1, 32, seed=2)
    sources = torch.cat([long, short.expand(4, L - 1, 32) + 0.1 * drawn(4, L - 1, 32, seed=3)], dim=1)
    parts = [long[CHOSEN["average"]], short[CHOSEN["per_token"]].expand(3, L - 1, 32)]
    return sources, torch.cat(parts, dim=1) + 0.1 * drawn(3, L, 32, seed=4)


@pytest.mark.parametrize("kind", ["average", "per_token"])
def test_spot_begins_at_the_source_that_is_most_alike(loaded, tmp_path: Path, monkeypatch, kind: str) -> None:
    (sources, probes), asked = sources_and_probes(), []

    def train(session, directory, runs, begun: Begun, target):
        directory.open()
        asked.append((begun.tuned, target))
        return SimpleNamespace(tuned=TunedPrompt.begin(probes, 1))

    monkeypatch.setattr(spot, "train", train)
    recipe = Recipe(method="spot", prompt={"length": L}, spot={"similarity": kind}, target={"steps": 70})
    begun = spot.begin(job(recipe, loaded, {"particles": sources}, "abcd", runs=3, directory=Part(path=tmp_path)))
    expected = [[similarity(probe.double(), source.double(), kind) for source in sources] for probe in probes]
    chosen = CHOSEN[kind]
    assert [row.index(max(row)) for row in expected] == chosen
    assert torch.equal(begun.tuned.full, sources[chosen])
    assert torch.equal(begun.tuned.composed()[:, 0], sources[chosen])
    told = json.loads((tmp_path / "probe" / "similarity.json").read_text())
    for name, row in zip(["seed-0", "seed-1", "seed-2"], expected, strict=True):
        assert told[name] == pytest.approx(dict(zip("abcd", row, strict=True)), abs=1e-6)
    ((start, target),) = asked
    assert (target.steps, begun.rows) == (7, 7 * 8)  # a tenth, of batches of the 8 rows that there are
    assert list(start.trained) == ["full"]
    assert all((token == loaded.backbone.shared.weight).all(dim=1).any() for token in start.full.flatten(0, 1))
