import pytest
import torch

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.prompts import ComposedPrompt, initial_prompts, vocabulary_ids

TABLE = torch.randn(6000, 8, generator=torch.Generator().manual_seed(0)) * 13


def test_ids_are_distinct_common_text_tokens_and_differ_between_particles_and_seeds() -> None:
    ids = vocabulary_ids(3, 50, 6000, seed=1)
    assert ids.shape == (3, 50)
    assert ids.min() >= 3
    assert ids.max() < 5000
    assert all(len(set(row.tolist())) == 50 for row in ids)
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids, vocabulary_ids(3, 50, 6000, seed=2))
    assert torch.equal(ids, vocabulary_ids(3, 50, 6000, seed=1))


def test_more_particles_leave_the_first_ones_as_they_were() -> None:
    assert torch.equal(vocabulary_ids(5, 20, 6000, 0)[:2], vocabulary_ids(2, 20, 6000, 0))


def test_vocab_starts_at_embeddings_normal_at_their_scale() -> None:
    vocab = initial_prompts("vocab", 2, 20, 6000, 0, lambda ids: TABLE[ids])
    assert torch.equal(vocab, TABLE[vocabulary_ids(2, 20, 6000, 0)])
    normal = initial_prompts("normal", 2, 500, 6000, 0, lambda ids: TABLE[ids])
    assert normal.std().item() == pytest.approx(13, rel=0.05)
    assert normal.dtype == torch.float32


def test_shared_starts_near_one_draw() -> None:
    first = TABLE[vocabulary_ids(1, 500, 6000, 0)]
    shared = initial_prompts("shared", 3, 500, 6000, 0, lambda ids: TABLE[ids], spread=0.2)
    apart = (shared - first).flatten(1)
    assert apart.std(dim=1).tolist() == pytest.approx([0.2 * 13] * 3, rel=0.05)
    assert abs(torch.corrcoef(apart)[0, 1]) < 0.05  # noise of their own
    assert torch.equal(initial_prompts("shared", 1, 500, 6000, 0, lambda ids: TABLE[ids]), first)


def test_too_long_a_prompt() -> None:
    with pytest.raises(UserError, match=r"prompt\.length 100"):
        vocabulary_ids(1, 100, 50, 0)


def test_composition_is_elementwise_rank_one() -> None:
    prompt = ComposedPrompt.start_at(torch.randn(4, 3), tasks=2)
    assert torch.equal(prompt.compose(), torch.stack([prompt.full, prompt.full]))
    prompt.a, prompt.b = torch.randn(2, 4), torch.randn(2, 3)
    for k in range(2):
        for i in range(4):
            for j in range(3):
                expected = prompt.full[i, j] * prompt.a[k, i] * prompt.b[k, j]
                assert prompt.compose()[k, i, j] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("tasks", "expected"), [(1, 77_668), (8, 10_468), (5, 16_228)])
def test_parameters_a_task_are_the_paper_s(tasks: int, expected: int) -> None:
    """Section 4.4: (l d) / N + (l + d); at T5-base and 100 tokens 77,668 for a single target."""
    prompt = TunedPrompt.begin(torch.zeros(1, 100, 768), tasks)
    assert prompt.parameters() / tasks == expected
    assert prompt.parameters() == sum(t.numel() for t in prompt.tensors()) == 100 * 768 + tasks * (100 + 768)
