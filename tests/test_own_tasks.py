"""Runs on tasks of the recipe's own, beside a built-in one: labels, numbers and free text, and mistakes in them."""

import json
from pathlib import Path

import pytest
import yaml
from scipy.stats import pearsonr, spearmanr

from bmtpt_ds.cli import main
from tests import toy
from tests.mistakes import Bench, Cases, assert_refused
from tests.tasks import squad_evaluation

TASKS = """
  tasks:
    reviews:
      folder: {folder}
      source: {{sentence: text}}
      target: stars
      labels: [negative, positive]
      metrics: [f1]
    prices: {{folder: {folder}, source: [text, shop], target: price, metrics: [pearson, spearman]}}
    echoes: {{folder: {folder}, source: {{sentence: text}}, target: words}}
"""


def write_rows(folder: Path) -> Path:
    """Rows with the columns of three tasks."""
    folder.mkdir()
    for split, count in (("train", 30), ("validation", 9), ("test", 8)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for i in range(count):
                words = ["the film", "a good plot", "the bad cat"][i % 3]
                row = {"text": f"{words} {i % 3} .", "shop": "house", "stars": ["negative", 1][i % 2]}
                file.write(json.dumps({**row, "price": str(i % 3), "words": [words, f"{words} ."]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def recipe_text(tmp_path_factory, untied_model, rows) -> str:
    folder = write_rows(tmp_path_factory.mktemp("own") / "files")
    text = toy.recipe_text(untied_model, rows).replace("[sst2, cola]", "[sst2, reviews, prices, echoes]")
    before, after = text.split(f"data: {{root: {rows}}}")
    return f"{before}data:\n  root: {rows}{TASKS.format(folder=folder)}{after}"


@pytest.fixture(scope="module")
def source_run(tmp_path_factory, recipe_text) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "recipe.yaml").write_text(recipe_text)
    run = folder / "run"
    chosen = ["--set", "source.steps=2", "--set", "source.eval_every=2"]
    assert main(["source", "--config", str(folder / "recipe.yaml"), *chosen, "--run-dir", str(run)]) == 0
    return run


def scored(run: Path, folder: Path, *arguments: str) -> tuple[dict, list[dict]]:
    """What `evaluate` writes."""
    files = [folder / "scores.json", folder / "predictions.jsonl"]
    options = ["--json", str(files[0]), "--predictions", str(files[1])]
    assert main(["evaluate", "--prompt", str(run), *options, *arguments]) == 0
    return json.loads(files[0].read_text()), [json.loads(line) for line in files[1].read_text().splitlines()]


def test_source_run_knows_its_tasks(source_run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((source_run / "config.yaml").read_text())
    assert list(config["data"]["tasks"]) == ["reviews", "prices", "echoes"]
    lines = [json.loads(line) for line in (source_run / "metrics.jsonl").read_text().splitlines()]
    assert {"sst2", "reviews", "prices", "echoes"} <= set(lines[-1]["validation"])
    scores, predictions = scored(source_run, tmp_path)
    assert list(scores["tasks"]) == ["sst2", "reviews", "prices", "echoes"]
    metrics = {name: (task["metric"], list(task["metrics"])) for name, task in scores["tasks"].items()}
    assert metrics == {
        "sst2": ("accuracy", ["accuracy"]),
        "reviews": ("f1", ["f1"]),
        "prices": ("pearson", ["pearson", "spearman"]),
        "echoes": ("exact_match", ["exact_match", "f1"]),
    }
    assert [scores["tasks"][name]["rows"] for name in metrics] == [15, 8, 8, 8]
    sources = {p["task"]: p["source"] for p in predictions}
    assert sources["reviews"] == "sentence: a good plot 1 ."
    assert sources["prices"] == "text: a good plot 1 . shop: house"


def adapted(task: str, source_run: Path, recipe_text: str, folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(recipe_text)
    run = folder / "run"
    chosen = ["--set", f"target.tasks=[{task}]", "--particles", str(source_run)]
    assert main(["adapt", "--config", str(folder / "recipe.yaml"), *chosen, "--run-dir", str(run)]) == 0
    return run


def test_adapt_to_numbers(source_run: Path, recipe_text: str, tmp_path: Path) -> None:
    run = adapted("prices", source_run, recipe_text, tmp_path)
    scores, predictions = scored(run, tmp_path)
    assert scores == json.loads((run / "results.json").read_text())
    task = scores["tasks"]["prices"]
    true = [float(p["target"]) for p in predictions]
    assert true == [0, 1, 2, 0, 1, 2, 0, 1]
    said = []
    for number, text in zip(true, (p["prediction"].strip() for p in predictions), strict=True):
        said.append(float(text) if text in ("0", "1", "2") else 2.0 if number < 1 else 0.0)
    constant = len(set(said)) == 1
    assert task["metrics"]["pearson"] == pytest.approx(0 if constant else 100 * pearsonr(true, said).statistic)
    assert task["metrics"]["spearman"] == pytest.approx(0 if constant else 100 * spearmanr(true, said).statistic)
    assert (task["score"], task["majority"]) == (task["metrics"]["pearson"], 0.0)


def test_adapt_to_free_text(source_run: Path, recipe_text: str, tmp_path: Path, capsys) -> None:
    run = adapted("echoes", source_run, recipe_text, tmp_path)
    scores, predictions = scored(run, tmp_path)
    task = scores["tasks"]["echoes"]
    references = [(p["target"], f"{p['target']} .") for p in predictions]
    expected = squad_evaluation.evaluate(references, [p["prediction"] for p in predictions])
    assert task["metrics"] == pytest.approx({name: expected[name] for name in ("exact_match", "f1")})
    assert task["majority"] == pytest.approx(100 * 3 / 8)
    capsys.readouterr()
    assert main(["evaluate", "--prompt", str(run), "--set", "evaluate.scoring=labels"]) == 2
    assert capsys.readouterr().err == (
        "bmtpt evaluate: task echoes has no labels but free text: set evaluate.scoring=generate\n"
    )


def test_the_likeliest_of_own_labels(source_run: Path, tmp_path: Path) -> None:
    words = ["--set", "data.labels=words", "--set", "evaluate.scoring=labels"]
    _, predictions = scored(source_run, tmp_path, "--task", "reviews", *words)
    assert {p["prediction"] for p in predictions} <= {"negative", "positive"}
    assert [p["target"] for p in predictions] == ["negative", "positive"] * 4


# --- mistakes --------------------------------------------------------------------------------------------------------

case = Cases()
OWN = "{source: [text], target: stars, labels: [negative, positive]}"


def setting(name: str, task: str, *expected: str, tasks: str = "[sst2, mine]") -> None:
    """A case with an own task `mine`, FILES in it being a folder of good rows."""

    def make(b: Bench):
        keys = task.replace("FILES", str(write_rows(b.folder / "files")))
        return b.source("--set", f"source.tasks={tasks}", "--set", f"data.tasks.mine={keys}"), list(expected)

    case[name] = make


setting("key", "{source: [text], taget: x}", "unknown key data.tasks.mine.taget", "did you mean target?")
setting("metric", OWN[:-1] + ", metrics: [pearson]}", "data.tasks.mine.metrics: pearson does not fit labels")
setting("folder_missing", OWN[:-1] + ", folder: nowhere}", "data.tasks.mine.folder: nowhere does not exist")
setting("folder_below_root", OWN, "mine is missing: put mine's train.jsonl and validation.jsonl there")
setting("column", "{source: [txt], target: stars, folder: FILES}", "files/train.jsonl:1: column 'txt' is missing")
setting("label", "{source: [text], target: shop, labels: [a, b], folder: FILES}", "'shop' must be one of a, b, not 'ho")
setting("number", "{source: [text], target: words, metrics: [pearson], folder: FILES}", "'words' must be a number")
setting("unknown", OWN, "unknown task 'mien'", "did you mean mine?", tasks="[mien]")


@case
def built_in(b: Bench):
    return b.source("--set", f"data.tasks.sst2={OWN}"), ["data.tasks.sst2: a built-in task has that name"]


@case
def likeliest_number(b: Bench):
    own = ["--set", "data.tasks.mine={source: [text], target: price, metrics: [pearson]}"]
    command = b.adapt(*own, "--set", "target.tasks=[mine]", "--set", "evaluate.scoring=labels")
    return command, ["task mine has no labels but numbers", "evaluate.scoring=generate"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)


def test_resume_sees_that_fields_of_an_own_task_changed_places(source_run: Path, recipe_text: str, tmp_path, capsys):
    mapped = recipe_text.replace("source: {sentence: text}", "source: {sentence: text, place: shop}")
    turned = recipe_text.replace("source: {sentence: text}", "source: {place: shop, sentence: text}")
    arguments = [
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--set",
        "source.steps=2",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    (tmp_path / "recipe.yaml").write_text(mapped)
    assert main(["source", *arguments]) == 0
    (tmp_path / "recipe.yaml").write_text(turned)
    capsys.readouterr()
    assert main(["source", *arguments, "--resume"]) == 2
    assert "data.tasks differs" in capsys.readouterr().err
