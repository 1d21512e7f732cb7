"""The prompted loss against transformers' own model, and against PEFT's prompt tuning."""

from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from bmtpt_ds.data.tokens import IGNORE, Batch, TokenRow, collate
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.backbone import (
    Backbone,
    build_backbone,
    checkpoint_activations,
    mean_token_losses,
    read_config,
)
from bmtpt_ds.model.packed import position_bias
from bmtpt_ds.model.weights import CheckpointReader

CPU = torch.device("cpu")


def load(folder: Path) -> Backbone:
    reader = CheckpointReader(folder)
    backbone = build_backbone(read_config(folder, 0.0), dtype=torch.float32, own_head=reader.has_own_head())
    for name, parameter in backbone.named_parameters():
        parameter.data.copy_(reader.read(name))
    return backbone


@pytest.fixture(params=["tied_model", "untied_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def example() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (3, 6), generator=draw)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    labels = torch.tensor([[40, 41, 1], [40, 1, IGNORE], [42, 1, IGNORE]])
    return {"source_ids": ids * mask, "source_mask": mask, "labels": labels}


def row_by_row(folder: Path, prompts: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row alone, unpadded, through transformers' from_pretrained model."""
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    losses = []
    for prompt, ids, mask, labels in zip(prompts, *batch.values(), strict=True):
        embedded = model.shared(ids[mask.bool()][None])
        kept = labels[labels != IGNORE][None]
        losses.append(model(inputs_embeds=torch.cat([prompt[None], embedded], 1), labels=kept).loss)
    return torch.stack(losses)


def test_losses_and_gradients_equal_transformers_row_by_row(folder: Path) -> None:
    backbone, batch = load(folder), example()
    prompts = torch.randn(3, 5, 32, requires_grad=True)
    losses = backbone.row_losses(prompts, [Batch(**batch)])
    (gradient,) = torch.autograd.grad(losses.sum(), prompts)
    expected = row_by_row(folder, prompts, batch)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), prompts)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_choices_of_a_row_have_the_losses_that_each_has_alone(folder: Path) -> None:
    backbone, batch, prompts = load(folder), example(), torch.randn(3, 5, 32)
    drawn = torch.randint(3, 40, (3, 4, 3), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[3, 2, 1, 3], [1, 1, 2, 0], [2, 3, 0, 0]])
    choices = drawn.masked_fill(torch.arange(3) >= lengths[..., None], IGNORE)
    found = backbone.row_losses(prompts, [Batch(batch["source_ids"], batch["source_mask"], choices)])
    for c in range(4):
        alone = Batch(batch["source_ids"], batch["source_mask"], choices[:, c])
        torch.testing.assert_close(found[:, c], backbone.row_losses(prompts, [alone]))


@pytest.mark.parametrize("cut", [[3], [1, 2], [1, 1, 1]])
def test_buckets_change_no_loss(folder: Path, cut: list[int]) -> None:
    """One bucket padded to the longest, or rows of several lengths without padding."""
    rows = [TokenRow([5, 6, 7, 8, 9, 1], [40, 41, 1]), TokenRow([10, 11, 12, 1], [40, 1]), TokenRow([13, 1], [42, 1])]
    prompts, backbone = torch.randn(3, 5, 32), load(folder)
    alone = [backbone.row_losses(p[None], collate([[row]], 0).on(CPU)) for p, row in zip(prompts, rows, strict=True)]
    ends = [sum(cut[: i + 1]) for i in range(len(cut))]
    buckets = collate([rows[end - size : end] for size, end in zip(cut, ends, strict=True)], 0).on(CPU)
    assert [bucket.source_mask is None for bucket in buckets] == [size == 1 for size in cut]
    torch.testing.assert_close(backbone.row_losses(prompts, buckets), torch.cat(alone))


def test_losses_equal_pefts_prompt_tuning(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = T5ForConditionalGeneration.from_pretrained(folder)
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=1, tokenizer_name_or_path=None
    )
    tuned = peft.get_peft_model(model, config).eval()
    prompt = torch.randn(5, 32)
    tuned.prompt_encoder.default.embedding.weight.data.copy_(prompt)
    batch = example()
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        theirs = tuned(input_ids=one["source_ids"], attention_mask=one["source_mask"], labels=one["labels"]).loss
        torch.testing.assert_close(load(folder).row_losses(prompt[None], [Batch(**one)])[0], theirs.detach())


@pytest.mark.parametrize("deepspeeds", [False, True])
def test_activation_checkpointing_changes_no_gradient(folder: Path, deepspeeds: bool) -> None:
    batch, prompts = example(), torch.randn(3, 5, 32)
    plain, recomputed = load(folder), load(folder)
    function = None
    if deepspeeds:
        function = pytest.importorskip("deepspeed").checkpointing.checkpoint
    checkpoint_activations(recomputed, function)
    recomputed.train(recomputed.train_while_tuning)
    gradients = []
    for backbone in (plain, recomputed):
        theta = prompts.clone().requires_grad_()
        backbone.row_losses(theta, [Batch(**batch)]).sum().backward()
        gradients.append(theta.grad)
    torch.testing.assert_close(*gradients)


def test_greedy_text_equals_transformers(folder: Path) -> None:
    batch = example()
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    theirs = model.generate(
        input_ids=batch["source_ids"], attention_mask=batch["source_mask"], max_new_tokens=6, do_sample=False
    )
    ours = load(folder).generate_ids(torch.zeros(3, 0, 32), Batch(**batch), 6)
    assert torch.equal(ours, theirs)


def test_prompt_changes_generation_through_the_encoder(folder: Path) -> None:
    """With a prompt, generation must see [theta ; x]: equal to transformers fed with those embeddings."""
    batch, prompts = example(), torch.randn(3, 5, 32) * 3
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    embedded = torch.cat([prompts, model.shared(batch["source_ids"])], 1)
    mask = Backbone.prompted_mask(batch["source_mask"], 5)
    theirs = model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    ours = load(folder).generate_ids(prompts, Batch(**batch), 6)
    assert torch.equal(ours, theirs)


def test_nothing_of_the_backbone_is_trained(folder: Path) -> None:
    backbone = load(folder)
    assert not any(p.requires_grad for p in backbone.parameters())
    prompts = torch.randn(3, 5, 32, requires_grad=True)
    backbone.row_losses(prompts, [Batch(**example())]).sum().backward()
    assert all(p.grad is None for p in backbone.parameters())


def test_loss_of_a_row_is_the_mean_over_its_own_tokens() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3], [4, IGNORE, IGNORE]])
    log_p = logits.log_softmax(-1)
    expected = [-(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[0, 2, 3]) / 3, -log_p[1, 0, 4]]
    for cut in ([labels], [labels[:1], labels[1:]]):
        found = mean_token_losses(logits.flatten(0, 1), cut)
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_position_bias_is_transformers(folder: Path, stack: str) -> None:
    of_stack = getattr(load(folder), stack)
    attention = of_stack.block[0].layer[0].SelfAttention
    for tokens in (1, 2, 15, 16, 17, 100, 129, 600):
        right = attention.compute_bias(tokens, tokens)
        if stack == "decoder":
            later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            right = right.masked_fill(later, torch.finfo(torch.float32).min)
        found = position_bias(of_stack, tokens, right)
        assert torch.equal(found, right)
        assert tokens == 1 or found.stride(-2) % 16 == 0  # where a GPU's kernels want rows to begin


def test_the_decoder_reads_what_transformers_gives_it(folder: Path) -> None:
    backbone, labels = load(folder), example()["labels"]
    choices = torch.stack([labels, labels.roll(1, 0)], dim=1)
    right = [backbone._shift_right(of_bucket).flatten() for of_bucket in (labels[:, :1], labels, choices)]
    assert torch.equal(backbone._decoder_ids([labels[:, :1], labels, choices]), torch.cat(right))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="T5 is needed"):
        read_config(tmp_path, 0.0)
