"""The digest of weights that are not loaded is that of the loaded ones."""

from pathlib import Path

import pytest

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.model.identity import weights_digest
from bmtpt_ds.parallel import Ranks, load_backbone
from tests import toy


@pytest.mark.parametrize("own_head", [True, False])
def test_digest_is_the_loaded_models(own_head: bool, tmp_path: Path) -> None:
    model = toy.make_model(tmp_path, own_head=own_head)
    loaded = load_backbone(Ranks(60), ModelConfig(name_or_path=str(model)), deepspeed_json.load("resident"))
    assert weights_digest(model) == loaded.weights


def test_digest_tells_weights_apart(tied_model: Path, tmp_path: Path) -> None:
    other = toy.make_model(tmp_path, own_head=False, seed=1)
    assert weights_digest(other) != weights_digest(tied_model)
