"""Where the prompt methods begin, what they train of it, and the tables' numbers of parameters."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.config import Recipe
from bmtpt_ds.errors import UserError
from bmtpt_ds.methods import attempt, bmtpt, method, mpt, prompt_tuning, spot, vanilla_transfer
from bmtpt_ds.methods.attempt import initial_attention, temperature_of
from bmtpt_ds.methods.job import Begun
from tests.methods.prompts import PROMPT_OF, ROWS, Part, drawn, gradient_of, job, step, t5_base

L, BOTTLENECK = 4, 3


def test_attempt_begins_as_it_says(loaded) -> None:
    recipe = Recipe(method="attempt", prompt={"length": L}, attempt={"bottleneck": BOTTLENECK})
    sources = drawn(3, L, 32)
    tuned = attempt.begin(job(recipe, loaded, {"particles": sources}, "abc", tasks=2, runs=2)).tuned
    assert torch.equal(tuned.sources, sources)
    vocabulary = loaded.backbone.shared.weight
    for prompt in tuned.own.flatten(0, 2):
        assert (prompt == vocabulary).all(dim=1).any()
    assert torch.equal(tuned.own[:, 0], tuned.own[:, 1])  # the tasks of a run begin alike, runs of two seeds do not
    assert not torch.equal(tuned.own[0], tuned.own[1])
    down, up, scale, shift = tuned.attention
    for drawn_uniformly, fan_in in ((down, 32), (up, BOTTLENECK)):
        assert 0.9 * fan_in**-0.5 < drawn_uniformly.abs().max() <= fan_in**-0.5
    assert not torch.equal(down[0], down[1])
    assert scale.eq(1).all() and shift.eq(0).all()
    assert tuned.temperature == math.e * 32
    assert (tuned.rate_of("own"), tuned.own_rates) == ("lr_full", {"lr_attention": 0.1})


def test_temperature_at_t5_base() -> None:
    assert int(temperature_of(Recipe().attempt, 768)) == 2087
    assert temperature_of(Recipe(attempt={"temperature": 10}).attempt, 768) == 10


def test_attention_is_drawn_by_the_seed_alone() -> None:
    first, again, other = (initial_attention(32, 5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_mpt_begins_at_the_means_of_the_parts(loaded) -> None:
    shared, names = drawn(L, 32), ["sst2", "cola", "qnli"]
    parts = {
        f"{name}.{part}": drawn(size, seed=i) for i, name in enumerate(names) for part, size in (("a", L), ("b", 32))
    }
    found = mpt.begin(job(Recipe(method="mpt"), loaded, {"shared": shared, **parts}, names, tasks=2, runs=2)).tuned
    u = [sum(parts[f"{name}.a"][i].item() for name in names) / 3 for i in range(L)]
    v = [sum(parts[f"{name}.b"][j].item() for name in names) / 3 for j in range(32)]
    expected = torch.tensor([[shared[i, j].item() * u[i] * v[j] for j in range(32)] for i in range(L)])
    torch.testing.assert_close(found.composed(), expected.expand(2, 2, L, 32))
    assert list(found.trained) == ["full", "a", "b"]
    assert [found.rate_of(name) for name in found.trained] == ["lr_full", "lr_low_rank", "lr_low_rank"]


def test_bmtpt_begins_at_the_mean(loaded) -> None:
    particles = drawn(3, L, 32)
    found = bmtpt.begin(job(Recipe(), loaded, {"particles": particles}, ["sst2"], tasks=2, runs=2))
    torch.testing.assert_close(found.tuned.composed(), (sum(particles) / 3).expand(2, 2, L, 32))
    assert (found.prior.kind, list(found.tuned.trained)) == ("gaussian", ["full", "a", "b"])


def test_bmtpt_begins_at_a_particle(loaded) -> None:
    """Which is then the whole prior."""
    particles = drawn(3, L, 32)
    recipe = Recipe(target={"start": 2, "sigma": 1.0})
    found = bmtpt.begin(job(recipe, loaded, {"particles": particles}, ["sst2"], tasks=2, runs=2))
    assert torch.equal(found.tuned.composed(), particles[2].expand(2, 2, L, 32))
    assert found.prior.negative_log(particles[2:].expand(2, 1, L, 32)).abs().max() == 0


def plain_method(name: str, loaded) -> TunedPrompt:
    """Of two runs of two tasks."""
    source = None if name == "prompt_tuning" else {"particles": drawn(1, 5, 32)}
    recipe = Recipe(method=name, prompt={"length": 5})
    return method(name).begin(job(recipe, loaded, source, ["sst2"], tasks=2, runs=2)).tuned


def test_vanilla_transfer_begins_at_the_one_prompt(loaded) -> None:
    assert torch.equal(plain_method("vanilla_transfer", loaded).composed(), drawn(1, 5, 32).expand(2, 2, 5, 32))
    with pytest.raises(UserError, match="holds 2 particles"):
        vanilla_transfer.begin(job(Recipe(), loaded, {"particles": drawn(2, 5, 32)}))


def test_prompt_tuning_begins_at_vocabulary_rows(loaded) -> None:
    full = plain_method("prompt_tuning", loaded).full
    assert all((token == loaded.backbone.shared.weight).all(dim=1).any() for token in full.flatten(0, 1))
    assert not torch.equal(full[0], full[1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["prompt_tuning", "vanilla_transfer"])
def test_a_and_b_stay_at_ones(loaded, name: str, optimizer: str) -> None:
    """Weight decay too moves W alone."""
    tuned = plain_method(name, loaded)
    before = tuned.full.clone()
    target = Recipe(target={"optimizer": optimizer, "weight_decay": 0.1, "warmup_steps": 0}).target
    for _ in range(3):
        step(loaded, tuned, target, gradient_of(loaded, tuned, ROWS, PROMPT_OF), PROMPT_OF)
    assert tuned.a.eq(1).all() and tuned.b.eq(1).all()
    for task in range(2):
        assert torch.equal(tuned.composed()[:, task], tuned.full)
        assert torch.equal(tuned.answering(1, task), tuned.full[1])
    assert (tuned.full - before).abs().mean(dim=(1, 2)).gt(1e-3).all()


# --- the tables' numbers of parameters -------------------------------------------------------------------------------

NAMES = [f"task{i}" for i in range(6)]
LEFT = {  # by the source stages, at T5-base sizes
    "particles": torch.ones(6, 100, 768),
    "one": torch.ones(1, 100, 768),
    "decomposed": {
        "shared": torch.ones(100, 768),
        **{f"{name}.a": torch.ones(100) for name in NAMES},
        **{f"{name}.b": torch.ones(768) for name in NAMES},
    },
}


def begin_at_t5_base(name: str, tasks: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(spot, "train", probed)
    source = {"mpt": LEFT["decomposed"], "vanilla_transfer": {"particles": LEFT["one"]}, "prompt_tuning": None}
    left = source.get(name, {"particles": LEFT["particles"]})
    return method(name).begin(
        job(Recipe(method=name), t5_base(), left, NAMES, tasks=tasks, directory=Part(path=tmp_path))
    )


def probed(session, directory, runs, begun: Begun, target):
    directory.open()
    return SimpleNamespace(tuned=begun.tuned)


@pytest.mark.parametrize(
    ("name", "tasks", "count"),
    [
        ("prompt_tuning", 1, 76_800),
        ("vanilla_transfer", 1, 76_800),
        ("spot", 1, 76_800),
        ("bmtpt", 1, 77_668),
        ("mpt", 1, 77_668),
        ("attempt", 1, 231_936),
        ("mpt", 8, 10_468),
        ("bmtpt", 8, 10_468),
        ("attempt", 8, 96_192),
    ],
)
def test_parameters_a_task_at_t5_base(name: str, tasks: int, count: int, tmp_path: Path, monkeypatch) -> None:
    tuned = begin_at_t5_base(name, tasks, tmp_path, monkeypatch).tuned
    assert tuned.tasks == tasks
    assert tuned.parameters() == count * tasks
    assert f"{count:,} parameters" in tuned.describe()


def test_stand_in_is_what_a_session_asks(loaded) -> None:
    """Else the sizes above would be of something else."""
    assert loaded.hidden_size == loaded.backbone.config.d_model
    assert loaded.embedding_rows(torch.tensor([3, 4])).shape == (2, 32)
    assert prompt_tuning.begin(job(Recipe(), t5_base())).tuned.full.shape == (1, 100, 768)
