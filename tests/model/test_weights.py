import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

from bmtpt_ds.errors import UserError
from bmtpt_ds.model.weights import HEAD, SHARED, CheckpointReader, WeightsIdentity, fingerprint
from bmtpt_ds.model_folder import read_architecture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_of_the_shards_adds_up_to_the_whole(dtype: torch.dtype) -> None:
    whole = torch.randn(1003).to(dtype)
    parts = [fingerprint(whole[a:b], offset=a) for a, b in ((0, 400), (400, 401), (401, 1003))]
    assert sum(parts) == fingerprint(whole)


def test_fingerprint_sees_order_sign_and_last_bit() -> None:
    values = torch.randn(64)
    swapped = values.clone()
    swapped[[3, 40]] = values[[40, 3]]
    nudged = values.clone()
    nudged[7] = torch.nextafter(values[7], torch.tensor(9e9))
    marks = {fingerprint(v).item() for v in (values, swapped, -values, nudged)}
    assert len(marks) == 4


def test_fingerprint_is_the_formula() -> None:
    values = torch.tensor([1.5, -2.0, 0.0], dtype=torch.float32)
    bits = values.view(torch.int32).tolist()
    expected = sum(b * (2 * i + 1) for i, b in enumerate(bits))
    assert fingerprint(values).item() == expected


def bin_copy(source: Path, target: Path, shards: int) -> Path:
    """The same checkpoint as .bin, in one file or several with an index."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    files = {f"pytorch_model-{i}.bin": names[i::shards] for i in range(shards)}
    for file, own in files.items():
        torch.save({n: tensors[n] for n in own}, target / file)
    weight_map = {n: file for file, own in files.items() for n in own}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_and_safetensors_read_alike(untied_model: Path, tmp_path: Path, shards: int) -> None:
    reader = CheckpointReader(bin_copy(untied_model, tmp_path / "bin", shards))
    expected = load_file(untied_model / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor)


def test_a_head_of_its_own_is_counted_as_transformers_writes_it(untied_model: Path, tmp_path: Path) -> None:
    """Loaded and saved by transformers 5, config.json says that it is tied."""
    T5ForConditionalGeneration.from_pretrained(untied_model).save_pretrained(tmp_path)
    for folder in (untied_model, tmp_path):
        assert CheckpointReader(folder).has_own_head()
        assert read_architecture(folder).own_head


def test_own_head_is_judged_by_the_tensors(tied_model: Path, untied_model: Path, tmp_path: Path) -> None:
    assert CheckpointReader(untied_model).has_own_head()
    assert not CheckpointReader(tied_model).has_own_head()
    # an old tied checkpoint may store the head too: equal, so it is no head of its own
    tensors = load_file(tied_model / "model.safetensors")
    tensors[HEAD] = tensors[SHARED].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert not CheckpointReader(tmp_path).has_own_head()


def test_embedding_under_an_alias(tied_model: Path, tmp_path: Path) -> None:
    tensors = load_file(tied_model / "model.safetensors")
    embedding = tensors.pop(SHARED)
    tensors["encoder.embed_tokens.weight"] = embedding
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(CheckpointReader(tmp_path).read(SHARED), embedding)


def test_missing_tensor_and_empty_folder(tied_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks nothing\.weight"):
        CheckpointReader(tied_model).read("nothing.weight")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        CheckpointReader(tmp_path)


def test_identity_depends_on_names_and_values_not_on_order() -> None:
    def digest(*pairs: tuple[str, torch.Tensor]) -> str:
        identity = WeightsIdentity()
        for name, tensor in pairs:
            identity.add(name, tensor)
        return identity.hexdigest()

    a, b = ("a", torch.ones(3)), ("b", torch.zeros(2))
    assert digest(a, b) == digest(b, a)
    assert digest(a, b) != digest(("a", b[1]), ("b", a[1]))
    assert digest(a) != digest(("a", torch.tensor([1.0, 1.0, 2.0])))
