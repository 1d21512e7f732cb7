from pathlib import Path

import pytest
import torch

from bmtpt_ds.config import DataConfig, ModelConfig
from bmtpt_ds.data.tokens import IGNORE, RowEncoder, TokenRow, collate, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import get_task


def test_collate_pads_on_the_right() -> None:
    batch = collate([TokenRow([5, 6, 1], [7, 1]), TokenRow([8, 1], [9, 4, 1])], 0, torch.device("cpu"))
    assert batch.source_ids.tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch.source_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[7, 1, IGNORE], [9, 4, 1]]


def test_digest_is_the_vocabularys_not_the_files(tied_model: Path, untied_model: Path) -> None:
    assert tokenizer_digest(load_tokenizer(tied_model)) == tokenizer_digest(load_tokenizer(untied_model))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize("labels", ["digits", "words"])
def test_real_rows_end_with_end_of_sequence_and_every_label_fits(shared: Path, labels: str) -> None:
    tokenizer = load_tokenizer(shared / "models" / "flan-t5-small-titles")
    encoder = RowEncoder(tokenizer, ModelConfig(max_source_length=32), DataConfig(labels=labels))
    task = get_task("mnli")
    row = {"premise": "a " * 100, "hypothesis": "b", "label": 1}
    encoded = encoder.encode(task, row)
    assert len(encoded.source) == 32
    assert encoded.source[-1] == encoded.target[-1] == tokenizer.eos_token_id
    for text in task.label_texts(labels):
        ids = encoder.encode_target(task, text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
