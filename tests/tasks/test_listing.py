"""`bmtpt tasks`: what it says of every task, and what it needs for that."""

import subprocess
import sys
from pathlib import Path

import pytest

import bmtpt_ds
from bmtpt_ds.cli import main
from bmtpt_ds.tasks import TASKS

RECIPE = """
data:
  tasks:
    reviews: {folder: my/reviews, source: {review: text}, target: stars, labels: [bad, good], metrics: [f1, accuracy]}
    summaries: {source: [article], target: summary}
    prices: {source: [text], target: price, metrics: [pearson]}
"""

SST2 = """\
sst2: nyu-mll/glue (sst2) on the hub
  columns sentence, label
  answers 0 negative, 1 positive
  metrics accuracy
  length  256 tokens of text with model.max_source_length: auto
  splits  validation is 10% of the hub's training set, at most 1000 rows; test is the hub's
          validation set
  example sentence: a warm and funny film .
          -> 1 (data.labels: digits) or positive (words)
"""

REVIEWS = """\
reviews: the recipe's own, in my/reviews
  columns text, stars
  answers 0 bad, 1 good
  metrics f1, accuracy
  length  256 tokens of text with model.max_source_length: auto
  splits  the files as they are; where test.jsonl is missing, half of the validation rows; where
          validation.jsonl is, 10% of the training rows, at most 1000
  example review: <text>
          -> 0 (data.labels: digits) or bad (words)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def shown(capsys, *arguments: str) -> str:
    assert main(["tasks", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def test_all_tasks(capsys) -> None:
    out = shown(capsys)
    paragraphs = dict(zip(TASKS, out.split("\n\n"), strict=True))
    assert max(map(len, out.splitlines())) <= 100
    for name, text in paragraphs.items():
        task, flat = TASKS[name], " ".join(text.split())
        assert text.startswith(f"{name}: {task.hub_repository}")
        configs = ", ".join(filter(None, task.hub_configs))
        assert not configs or f"({configs})" in text
        assert f"columns {', '.join(task.columns)} " in flat
        assert f"metrics {', '.join(task.metrics)} " in flat
        for number, word in enumerate(task.answer_texts("words") or () if task.target.kind == "label" else ()):
            assert f"{number} {word}" in flat
        source, digits = task.example(task.sample)
        assert f"example {source} -> {digits}" in flat
        assert task.example(task.sample, labels="words").target in flat


def test_named_tasks(capsys, recipe) -> None:
    assert shown(capsys, "sst2") == SST2
    assert shown(capsys, "squad", "sst2", "squad").endswith(f"\n\n{SST2}")
    assert shown(capsys, "--config", recipe, "reviews") == REVIEWS
    assert shown(capsys, "reviews", "sst2", "--config", recipe) == f"{REVIEWS}\n{SST2}"


def test_own_tasks_come_last(capsys, recipe) -> None:
    out = shown(capsys, "--config", recipe)
    assert [text.partition(":")[0] for text in out.split("\n\n")] == [*TASKS, "reviews", "summaries", "prices"]
    assert max(map(len, out.splitlines())) <= 100
    assert "summaries: the recipe's own, in <data.root>/summaries" in out
    assert "free text, the first of summary; all of them are accepted" in out
    assert "a number, as it stands" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnil"], "unknown task 'mnil': did you mean mnli? (known: sst2, "),
        (["rte", "reviws", "--config", "recipe.yaml"], "unknown task 'reviws': did you mean reviews? (known: sst2, "),
        (["--config", "nowhere.yaml"], "recipe nowhere.yaml: no such file"),
    ],
)
def test_mistakes(capsys, recipe, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(Path(recipe).parent)
    assert main(["tasks", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"bmtpt tasks: {message}") and len(err.splitlines()) == 1


def test_needs_neither_torch_nor_datasets(recipe) -> None:
    heavy = ("torch", "deepspeed", "transformers", "datasets", "sklearn", "scipy", "numpy", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}));"  # None: importing it fails
        f"from bmtpt_ds.cli import main; sys.exit(main(['tasks', '--config', {recipe!r}]))"
    )
    root = Path(bmtpt_ds.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(SST2) and REVIEWS in run.stdout
