"""The frozen T5 under ZeRO-3 on two ranks: what a rank holds, and that it computes what transformers' own T5 does.

The worker (`backbone_worker.py`) runs on the ranks; the unsharded model to compare with is loaded here.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from tests import launch

WORKER = launch.ROOT / "tests/distributed/backbone_worker.py"
RANKS = 2
EMBEDDING = "shared.weight"
TRANSLATION = ("translate English to German: The house is wonderful.", "Das Haus ist wunderbar.")

Seen = list[dict]  # what each rank wrote


def _run_worker(folder: Path, cases: dict) -> Seen:
    (folder / "cases.json").write_text(json.dumps(cases))
    launch.run(launch.forked(RANKS, WORKER, folder), folder / "log")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def _make_batch(file: Path, rows: int = 6, length: int = 5, hidden: int = 32, vocab: int = 96) -> None:
    """Random rows of different lengths, padded on the right."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (rows, 9), generator=draw)
    mask = (torch.arange(9) < torch.randint(2, 10, (rows, 1), generator=draw)).long()
    labels = torch.randint(3, vocab, (rows, 4), generator=draw)
    labels[torch.arange(4) >= torch.randint(1, 5, (rows, 1), generator=draw)] = -100
    prompts = torch.randn(rows, length, hidden, generator=draw)
    save_file({"prompts": prompts, "source_ids": ids * mask, "source_mask": mask, "labels": labels}, file)


def _make_large(folder: Path) -> Path:
    """200 MB of weights in tensors of 1 to 4 MB; a tokenizer is not needed."""
    folder.mkdir()
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "vocab_size": 512}
    T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("backbone")


@pytest.fixture(scope="module")
def seen(folder: Path, tied_model: Path, untied_model: Path) -> Seen:
    models = {"tied": str(tied_model), "untied": str(untied_model)}
    for case in models:
        _make_batch(folder / f"{case}.safetensors")
    wrong = {
        "lm_head.weight": models["untied"],
        EMBEDDING: models["tied"],
        "decoder.block.1.layer.1.EncDecAttention.k.weight": models["tied"],
    }
    large = _make_large(folder / "large")
    return _run_worker(folder, {"large": str(large), "models": models, "wrong": wrong})


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_parameters_are_sharded_as_they_come_into_being(seen: Seen, case: str) -> None:
    for rank in seen:
        shards, unsharded = rank[case]["shards"], rank[case]["unsharded"]
        assert set(rank[case]["built"].values()) == {0}
        assert all(shard == -(-whole // RANKS) for whole, shard in shards.values())
        assert ("lm_head.weight" in shards) == (case == "untied")
        assert {name.split(".")[-2] for name in unsharded} == {"layer_norm", "relative_attention_bias"}


def test_no_rank_ever_holds_the_model_whole(seen: Seen, folder: Path) -> None:
    """Highest resident memory while 200 MB of weights are loaded; the resident layout shows that it would be seen."""
    whole = (folder / "large/model.safetensors").stat().st_size
    assert whole > 2e8
    for rank in seen:
        assert rank["peak resident"] > whole
        assert rank["peak zero3_cpu"] < 0.9 * whole


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_after_a_step_only_the_embedding_stays_whole(seen: Seen, case: str) -> None:
    for rank in seen:
        norms = {name for name, (whole, _) in rank[case]["shards"].items() if whole <= rank[case]["threshold"]}
        for held in rank[case]["after steps"]:
            assert len(held) > 30
            assert {name for name, numbers in held.items() if numbers and name not in norms} <= {EMBEDDING}


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_a_block_is_gathered_in_one_piece(seen: Seen, case: str) -> None:
    """On its way there and on its way back; the last of all waits in between. A rank sends its half."""
    for rank in seen:
        sizes = {name: 4 * shard for name, (_, shard) in rank[case]["shards"].items() if ".block." in name}
        assert list(sizes) == [f"{stack}.block.{i}.matrices" for stack in ("encoder", "decoder") for i in range(2)]
        of_encoder, of_decoder = sizes["encoder.block.0.matrices"], sizes["decoder.block.0.matrices"]
        for gathers in rank[case]["gathers"]:
            assert [gathers.count(of_encoder), gathers.count(of_decoder)] == [4, 3], (sizes, gathers)


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_backbone_is_frozen_and_has_no_optimizer(seen: Seen, case: str) -> None:
    for rank in seen:
        assert rank[case]["trainable"] == []
        assert rank[case]["optimizers"] == []
        assert rank[case]["gradients of weights"] == []


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_losses_and_prompt_gradient_are_those_of_the_unsharded_model(
    seen: Seen, folder: Path, request: pytest.FixtureRequest, case: str
) -> None:
    model = T5ForConditionalGeneration.from_pretrained(request.getfixturevalue(f"{case}_model")).eval()
    assert torch.equal(model.lm_head.weight, model.shared.weight) == (case == "tied")
    batch = load_file(folder / f"{case}.safetensors")
    prompts = batch["prompts"].requires_grad_()
    losses = _row_losses(model, prompts, batch)
    losses.sum().backward()
    for rank in range(RANKS):
        found = load_file(folder / f"{case}.rank{rank}.safetensors")
        torch.testing.assert_close(found["losses"], losses.detach()[rank::RANKS], rtol=1e-5, atol=0)
        right = prompts.grad[rank::RANKS]
        assert (found["gradient"] - right).norm() < 1e-5 * right.norm()


def _row_losses(model: T5ForConditionalGeneration, prompts: torch.Tensor, batch: dict) -> torch.Tensor:
    """Mean cross-entropy of each row, row by row, without padding."""
    losses = []
    for i, prompt in enumerate(prompts):
        ids = batch["source_ids"][i][batch["source_mask"][i] == 1]
        labels = batch["labels"][i][batch["labels"][i] != -100]
        inputs = torch.cat([prompt, model.shared(ids)])[None]
        losses.append(cross_entropy(model(inputs_embeds=inputs, labels=labels[None]).logits[0], labels))
    return torch.stack(losses)


def test_a_weight_that_differs_from_the_checkpoint_is_found(seen: Seen) -> None:
    for rank in seen:
        assert len(rank["wrong"]) == 3
        for name, error in rank["wrong"].items():
            assert error and name in error, name


@pytest.mark.shared
def test_real_model_translates(shared: Path, tmp_path: Path) -> None:
    """flan-t5-small, whose head is its own: the checkpoint that is silently garbage when it is tied."""
    path = shared / "models/flan-t5-small-titles"
    source, target = TRANSLATION
    ranks = _run_worker(tmp_path, {"translate": [str(path), source, target]})
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    labels = tokenizer([target], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(**tokenizer([source], return_tensors="pt"), labels=labels).loss.item()
    for rank in ranks:
        assert rank["translate"]["loss"] == pytest.approx(loss, rel=1e-4)
        assert rank["translate"]["text"] == target
