from pathlib import Path

import pytest
import torch

from bmtpt_ds.config import DataConfig, ModelConfig
from bmtpt_ds.config.own_task import OwnTask
from bmtpt_ds.data.tokens import IGNORE, RowEncoder, TokenRow, collate, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, get_task


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
    row = {"premise": "a " * 100, "hypothesis": "b", "label": 1}
    task = get_task("mnli")
    encoded = encoder.encode(task, row)
    assert len(encoded.source) == 32
    assert encoded.source[-1] == encoded.target[-1] == tokenizer.eos_token_id
    for task in TASKS.values():
        encoder.check_answers(task)
        texts = task.answer_texts(labels)
        for text in texts or ():
            ids = encoder.encode_target(task, text)
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        longest = max(len(tokenizer(text).input_ids) for text in texts) if texts else 32
        assert encoder.max_target_length(task) == longest


def own(*labels: str, **keys):
    return get_task("mine", {"mine": OwnTask(source=["text"], target="label", labels=labels or None, **keys)})


def test_free_text_and_numbers_have_32_tokens(encoder, tied_model: Path) -> None:
    row = {"text": "a film", "label": "good film " * 40}
    assert len(encoder.encode(own(), row).target) == encoder.max_target_length(own()) == 32
    assert encoder.max_target_length(own(metrics=["pearson"])) == 32
    said = RowEncoder(load_tokenizer(tied_model), ModelConfig(max_target_length=50), DataConfig())
    assert len(said.encode(own(), row).target) == 50


def test_labels_that_the_tokenizer_cannot_write(tied_model: Path) -> None:
    tokenizer, words = load_tokenizer(tied_model), DataConfig(labels="words")
    RowEncoder(tokenizer, ModelConfig(), words).check_answers(own("good film", "bad film"))
    RowEncoder(tokenizer, ModelConfig(), words).check_answers(own())
    with pytest.raises(UserError) as caught:
        RowEncoder(tokenizer, ModelConfig(), words).check_answers(own("good", "好评"))
    assert "task mine: the model's tokenizer reads the answer '好评' back as ''" in str(caught.value)
    assert str(caught.value).endswith("; take another model or set data.labels=digits")
    with pytest.raises(UserError, match=r"'good film' back as 'good': .* or set model\.max_target_length=auto or "):
        RowEncoder(tokenizer, ModelConfig(max_target_length=2), words).check_answers(own("bad", "good film"))
    RowEncoder(tokenizer, ModelConfig(max_target_length=2), DataConfig()).check_answers(own("bad", "good film"))
