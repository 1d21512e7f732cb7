"""The toy world: labels follow the rule, instructions are where they should be, and only there; the model is kept."""

import math
from pathlib import Path
from random import Random

import pytest
from transformers import T5ForConditionalGeneration

from bmtpt_ds.config import load_recipe
from bmtpt_ds.data.tokens import load_tokenizer
from bmtpt_ds.experiments.demo import TARGETS
from bmtpt_ds.experiments.toy_model import toy_model
from bmtpt_ds.experiments.toy_world import FILLERS, RULES, SHARED_RULE, pretraining_text, rows_of, vocabulary
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import Task, get_task


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    own = load_recipe("demo").data.tasks
    return [get_task(name, own) for name in own]


@pytest.mark.parametrize("rule", RULES)
def test_labels_follow_the_rule_and_nothing_else(rule: str) -> None:
    rows = rows_of("film", rule, 400, Random(0))
    assert len({row["text"] for row in rows}) == 400
    agreements = {}
    for name, sides in RULES.items():
        values = [int(bool(set(sides[1]) & set(row["text"].split()))) for row in rows]
        agreements[name] = sum(value == row["label"] for value, row in zip(values, rows, strict=True)) / 400
    assert agreements.pop(rule) == 1
    # four standard deviations of a coin's mean over 400 throws
    assert all(abs(share - 0.5) < 4 * 0.5 / math.sqrt(400) for share in agreements.values()), agreements


def test_no_text_of_a_task_names_a_rule(tasks: list[Task]) -> None:
    for task in tasks:
        for row in rows_of(task.name, SHARED_RULE, 50, Random(1)):
            words = set(task.source_text(row).split())
            assert not words & {*RULES, *FILLERS}


def test_an_instruction_names_one_rule_and_the_answer_follows_it(tasks: list[Task]) -> None:
    draw, unnamed = Random(2), []
    for _ in range(300):
        source, target = pretraining_text(tasks, draw)
        words = source.split()
        (task,) = (t for t in tasks if f"topic: {t.name} text:" in source)
        label, shown = task.label_texts("words").index(target), set(words[words.index("text:") :])
        agrees = {rule: bool(set(sides[1]) & shown) == label for rule, sides in RULES.items()}
        named = set(words) & set(RULES)
        assert set(words[: words.index("topic:")]) - named <= set(FILLERS)
        if named:
            (rule,) = named
            assert agrees[rule]
        else:
            unnamed.append(agrees)
    assert 20 <= len(unnamed) <= 60  # one in eight, 37
    # and no rule is the habit there: one that is drawn from eight agrees with each in 9 texts of 16
    assert all(sum(agrees[rule] for agrees in unnamed) < 0.85 * len(unnamed) for rule in RULES)


def test_words_tell_rules_apart(tasks: list[Task]) -> None:
    sides = [word for rule in RULES.values() for side in rule for word in side]
    assert len(set(sides)) == len(sides)
    assert not set(sides) & {*FILLERS, *RULES}
    assert set(vocabulary(tasks)) >= {*sides, *FILLERS, *RULES}


def test_targets_are_no_sources(tasks: list[Task]) -> None:
    sources = load_recipe("demo").source.tasks
    assert {*sources, *TARGETS} == {task.name for task in tasks}
    assert not set(sources) & set(TARGETS)


def test_the_model_is_kept_for_the_same_world(tasks: list[Task], tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def make(some: list[Task], steps: int) -> int:
        with StopSignal() as stop:
            toy_model(folder, some, stop, steps=steps)
        return (folder / "model.safetensors").stat().st_mtime_ns

    made = make(tasks, 2)
    assert make(tasks, 2) == made
    assert (again := make(tasks, 3)) != made
    assert make(tasks[:-1], 3) != again
    model = T5ForConditionalGeneration.from_pretrained(folder)
    assert model.config.vocab_size == len(load_tokenizer(folder))


def test_a_model_broken_off_is_made_anew(tasks: list[Task], tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"torn")
    with StopSignal() as stop:
        toy_model(tmp_path, tasks, stop, steps=1)
    text = "topic: course text: yesterday he saw one lovely big red cat in the kitchen"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
