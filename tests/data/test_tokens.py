from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtpt_ds.config import DataConfig, ModelConfig
from bmtpt_ds.config.own_task import OwnTask
from bmtpt_ds.data.tokens import IGNORE, RowEncoder, TokenRow, collate, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, get_task


def test_collate_pads_on_the_right() -> None:
    (batch,) = collate([[TokenRow([5, 6, 1], [7, 1]), TokenRow([8, 1], [9, 4, 1])]], 0).on(torch.device("cpu"))
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
    assert 28 <= len(encoded.source) <= 32
    assert tokenizer.decode(encoded.source).endswith("hypothesis: b</s>")
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


def test_the_long_field_is_cut_and_the_question_survives(encoder) -> None:
    """32 tokens; wherever the long one stands."""
    squad, words = get_task("squad"), "good film dog cat house".split()
    row = {"question": "the cat sees", "context": " ".join(words * 20), "answers": {"text": ["dog"]}}
    for fields in (squad.fields, squad.fields[::-1]):
        source = encoder.encode(replace(squad, fields=fields), row).source
        assert len(source) == 32
        assert source[-1] == encoder.tokenizer.eos_token_id
        text = encoder.tokenizer.decode(source, skip_special_tokens=True)
        assert "the cat sees" in text
        assert text.count("good") >= 4


def test_short_rows_are_not_touched_and_one_field_is_cut_at_its_end(encoder) -> None:
    squad, sst2 = get_task("squad"), get_task("sst2")
    short = {"question": "the cat ?", "context": "good film", "answers": {"text": ["dog"]}}
    assert encoder.encode(squad, short).source == encoder.tokenizer(squad.example(short).source).input_ids
    long = {"sentence": "good film " * 40, "label": 1}
    text = sst2.example(long).source
    assert encoder.encode(sst2, long).source == encoder.tokenizer(text, truncation=True, max_length=32).input_ids


def test_two_long_fields_are_cut_alike(encoder) -> None:
    row = {"premise": "good film " * 30, "hypothesis": "bad film " * 30, "label": 1}
    text = encoder.tokenizer.decode(encoder.encode(get_task("mnli"), row).source, skip_special_tokens=True)
    assert abs(text.count("good") - text.count("bad")) <= 2
    assert text.count("bad") >= 5


@pytest.mark.parametrize("gap", [" ", "\n", "\t", "x"])
def test_a_long_field_loses_no_more_than_its_end_whatever_parts_its_words(encoder, gap: str) -> None:
    """Passages in lines, tables, and what has no words at all behind a first one."""
    squad = get_task("squad")
    row = {"question": "the cat ?", "context": "good " + gap.join(["filmdog"] * 200), "answers": {"text": ["dog"]}}
    cut = squad.source_text(row, most=400)
    assert 380 < len(cut.partition("context: ")[2]) <= 400
    assert squad.source_text(row).startswith(cut)
    assert cut.endswith("filmdog") or gap == "x"


def test_rows_that_were_cut_are_counted_by_task(tied_model: Path) -> None:
    encoder = RowEncoder(load_tokenizer(tied_model), ModelConfig(max_source_length=32), DataConfig())
    assert encoder.cut_rows() == ""
    long = {"premise": "good film " * 30, "hypothesis": "bad", "label": 1}
    short = long | {"premise": "good film"}
    encoder.encode_all(get_task("mnli"), [long, short, short, short])
    encoder.encode_all(get_task("rte"), [{"sentence1": "a", "sentence2": "b", "label": 1}])
    assert encoder.cut_rows() == "cut to model.max_source_length, of the rows read: mnli 25.0% (to 32 tokens)"


@pytest.mark.parametrize(
    ("name", "most"), [("rte", 256), ("record", 256), ("multirc", 348), ("squad", 512), ("nq", 512)]
)
def test_lengths_of_the_tasks(tied_model: Path, name: str, most: int) -> None:
    """With `auto` each task has its own; a number holds for all."""
    task, tokenizer = get_task(name), load_tokenizer(tied_model)
    row = dict(task.sample)
    column = {"rte": "sentence1", "record": "passage", "multirc": "paragraph"}.get(name, "context")
    row[column] = "good film " * 400
    auto = RowEncoder(tokenizer, ModelConfig(max_source_length="auto"), DataConfig())
    assert len(auto.encode(task, row).source) == most
    assert len(auto.encode_text(task, "good " * 600)) == most
    assert auto.cut_rows().endswith(f"{name} 100.0% (to {most} tokens)")
    assert len(RowEncoder(tokenizer, ModelConfig(max_source_length=40), DataConfig()).encode(task, row).source) == 40


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=300), min_size=2, max_size=2))
def test_whatever_the_text_it_fits(encoder, texts) -> None:
    premise, hypothesis = texts
    source = encoder.encode(get_task("mnli"), {"premise": premise, "hypothesis": hypothesis, "label": 0}).source
    assert len(source) <= 32
    assert source[-1] == encoder.tokenizer.eos_token_id


def test_two_threads_may_read_rows_at_once(tied_model: Path) -> None:
    """The next step's rows are encoded while the validation's are."""
    encoder = RowEncoder(load_tokenizer(tied_model), ModelConfig(max_source_length=40), DataConfig())
    task, rows = get_task("sst2"), [{"sentence": "good film " * n, "label": 0} for n in (1, 60, 3, 90)]
    expected = encoder.encode_all(task, rows)

    def read(_: int) -> bool:
        texts = [encoder.encode_text(task, "bad film " * n) for n in (1, 70)]
        return [encoder.encode(task, row) for row in rows] == expected and list(map(len, texts)) == [3, 40]

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(read, range(100)))
    assert encoder.cut_rows().endswith("sst2 50.0% (to 40 tokens)")
