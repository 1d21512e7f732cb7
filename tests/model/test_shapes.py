"""The published T5s have the sizes, and so the parameters, that are published."""

import pytest
import torch
from transformers import T5Config

from bmtpt_ds.errors import UserError
from bmtpt_ds.model.backbone import build_backbone
from bmtpt_ds.model.footprint import weight_bytes
from bmtpt_ds.model.shapes import SHAPES, architecture_by_name, shape

# of google-t5/*, google/t5-v1_1-* and google/flan-t5-* as transformers loads them
PARAMETERS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_counts(name: str) -> None:
    assert architecture_by_name(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_module(name: str) -> None:
    values = shape(name)
    with torch.device("meta"):
        own_head = not values["tie_word_embeddings"]
        backbone = build_backbone(T5Config(**values), dtype=torch.bfloat16, own_head=own_head)
    assert weight_bytes(architecture_by_name(name), 2) == sum(p.nbytes for p in backbone.parameters())


def test_names_with_and_without_owner() -> None:
    assert architecture_by_name("google/flan-t5-xl") == architecture_by_name("t5-v1_1-xl")
    with pytest.raises(UserError, match="t5-3b"):
        architecture_by_name("google-t5/t5-3c")
    with pytest.raises(UserError, match="there are t5-small"):
        architecture_by_name("llama")
