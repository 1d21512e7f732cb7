"""The model card of an exported prompt: README.md as the Hugging Face hub reads it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.tokens import FREE_TEXT
from bmtpt_ds.export.record import FOREIGN, Record
from bmtpt_ds.tasks import Task, get_task

CARD = "README.md"
_METHODS = {
    "bmtpt": "Bayesian multi-task prompt tuning (Lee, Jeong, Yun and Kim, *Bayesian Multi-Task Transfer Learning for "
    "Soft Prompt Tuning*, Findings of EMNLP 2023)",
    "prompt_tuning": "prompt tuning (Lester et al. 2021)",
    "vanilla_transfer": "vanilla transfer: one prompt on all source tasks together, then on the target's",
    "spot": "SPoT (Vu et al. 2022)",
    "mpt": "multitask prompt tuning, MPT (Wang et al. 2023)",
}
_COMPOSES = ("bmtpt", "mpt")  # train a and b; with the others they stay at one


class Card(NamedTuple):
    """What a card tells of."""

    base_model: str
    license: str
    record: Record
    multitask: bool  # whether PEFT wants the number of a task with every row

    @property
    def recipe(self) -> Recipe:
        return Recipe(**self.record.recipe)

    @property
    def adapted(self) -> bool:
        return self.record.stage == "adapt"

    @property
    def foreign(self) -> bool:
        """Whether the prompt was trained by others, and imported."""
        return self.method == FOREIGN

    @property
    def method(self) -> str:
        return self.record.state.get("method", "bmtpt")

    @property
    def tasks(self) -> list[Task]:
        return [get_task(name, self.recipe.data.tasks) for name in self.record.tasks]

    @property
    def length(self) -> int:
        return self.recipe.prompt.length


def model_card(card: Card) -> str:
    """The card's text: front matter, tasks, scores, training, how to load it, licence, versions."""
    sections = [
        _front_matter(card),
        _title(card),
        "## Tasks\n" + _tasks(card),
        "## Scores\n" + _scores(card),
        "## Training\n" + _training(card),
        "## How to load it\n" + _loading(card),
        "## Licence\n" + _licence(card),
        "## Versions\n" + ", ".join(f"{name} {v}" for name, v in card.record.state.get("versions", {}).items()),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(card: Card) -> str:
    repositories = (task.hub_repository for task in card.tasks if task.name not in card.recipe.data.tasks)
    tags = ["prompt-tuning", "soft-prompt", "t5", *([] if card.foreign else [card.method.replace("_", "-")])]
    values: dict[str, Any] = {
        "base_model": card.base_model,
        "library_name": "peft",
        "license": card.license,
        "tags": list(dict.fromkeys([*tags, *card.record.tasks])),
    }
    if datasets := sorted(set(filter(None, repositories))):
        values["datasets"] = datasets
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _title(card: Card) -> str:
    names, base = ", ".join(card.record.tasks), card.base_model
    if card.foreign and not card.adapted:
        head, what = "# A soft prompt to start from", "It is the mean of prompts trained with PEFT."
    elif not card.adapted:
        head = f"# A soft prompt to start from, learned from {names}"
        what = f"It is {_start(card.method)}: a start for tuning on a new task, of no task itself."
    else:
        head = f"# A soft prompt for {names}"
        what = "Each task's prompt is `W * (a b^T)`, W shared." if card.multitask else "It is composed, `W * (a b^T)`."
    made = f"Made by bmtpt_ds, {_METHODS.get(card.method, card.method)}."
    made = "Trained with PEFT; imported and exported again by bmtpt_ds." if card.foreign else made
    return f"{head}\n{card.length} virtual tokens before the encoder's input of the frozen {base}. {what} {made}"


def _start(method: str) -> str:
    """What a source stage's prompt is."""
    if method == "bmtpt":
        return "the mean of the particles of a source stage, a posterior's"
    return "the shared prompt with the mean of the tasks' own parts" if method == "mpt" else "the source stage's prompt"


def _tasks(card: Card) -> str:
    head, rows = ("task", "the model reads", "and writes"), [_as_read(card, task) for task in card.tasks]
    if card.multitask:
        return _table(("task id", *head), [(str(number), *row) for number, row in enumerate(rows)])
    if card.adapted:
        return _table(head, rows)
    if not rows:
        return "It was learned from tasks that are not recorded."
    return f"It was learned from {', '.join(card.record.tasks)}, whose rows were written so:\n\n{_table(head, rows)}"


def _as_read(card: Card, task: Task) -> tuple[str, str, str]:
    """Its name, an example of its text, its answers."""
    texts, words = (task.answer_texts(style) for style in (card.recipe.data.labels, "words"))
    answers = "free text or a number"
    if texts:
        answers = ", ".join(f"`{t}`" + (f" ({w})" if t != w else "") for t, w in zip(texts, words, strict=True))
    return task.name, f"`{_example(card, task)}`", answers


def _example(card: Card, task: Task) -> str:
    data = card.recipe.data
    return " ".join(task.example(task.sample, labels=data.labels, prefix=data.prefix).source.split())


def _scores(card: Card) -> str:
    results = card.record.results or {}
    if not results.get("tasks"):
        return "None: the run has not been scored." if card.adapted else "None: a source stage is not scored."
    head = ("task", "metric", "score", "majority class", "other metrics", "rows")
    rows = [
        (name, s["metric"], f"{s['score']:.1f}", f"{s['majority']:.1f}", _others(s), str(s["rows"]))
        for name, s in results["tasks"].items()
    ]
    how = f"Split {results.get('split')}, 0 to 100, beside always giving the most frequent answer. "
    return how + f"Seed {results.get('seed')}, {_shots(card)}.\n\n" + _table(head, rows)


def _others(score: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in score["metrics"].items() if name != score["metric"])


def _shots(card: Card) -> str:
    shots = card.recipe.target.shots
    return f"{shots} labelled rows a task (shots)" if shots else "all training rows"


def _training(card: Card) -> str:
    if card.foreign:
        return "Not recorded: the prompt was imported."
    state, processed = card.record.state, card.record.state["rows_processed"]
    began = card.record.from_particles
    began = bool(processed["source"]) if began is None else began
    rows = [
        ("method", card.method),
        ("precision of the backbone", card.recipe.model.dtype),
        ("seed", str(state.get("seed"))),
        *_source_training(card, began),
        *(_target_training(card, began) if card.adapted else []),
        ("rows times prompts seen", f"source {processed['source']}, target {processed['target']}"),
    ]
    text = _table(("setting", "value"), rows)
    if card.adapted and processed["source"]:
        text += "\n\nThe source stage's values are those that this run's recipe names."
    return text


def _source_training(card: Card, began: bool) -> list[tuple[str, str]]:
    """`began`: whether the adaptation began at what `--particles` named."""
    source = card.recipe.source
    if not card.record.state["rows_processed"]["source"]:
        start = "the mean of imported particles" if began else f"{card.recipe.prompt.init}, no source stage"
        return [("start", start)]
    rows = [
        ("source tasks", ", ".join(source.tasks) or "not in the recipe"),
        ("source steps, learning rate", f"{source.steps}, {source.lr} ({source.optimizer})"),
    ]
    if card.method == "bmtpt":
        svgd = f"{source.svgd.bandwidth}, {source.svgd.damping}"
        rows += [("particles M", str(source.particles)), ("bandwidth, damping of SVGD", svgd)]
    return rows


def _target_training(card: Card, began: bool) -> list[tuple[str, str]]:
    target = card.recipe.target
    rate = ("learning rate of W", f"{target.lr_full} ({target.optimizer})")
    if card.method in _COMPOSES:
        rate = ("learning rate of W, of a and b", f"{target.lr_full}, {target.lr_low_rank} ({target.optimizer})")
    rows = [("target steps of rows", f"{target.steps} of {target.batch_size}, {_shots(card)}"), rate]
    if card.method == "bmtpt":
        prior = f"{target.prior}, sigma {target.sigma:g}" if began and target.prior != "none" else "none"
        rows.append(("prior", prior))
    return rows


def _loading(card: Card) -> str:
    texts = [_example(card, task) for task in card.tasks][: None if card.multitask else 1] or ["a text"]
    numbers = f", task_ids=torch.tensor({list(range(len(texts)))})" if card.multitask else ""
    told = "`task_ids` names each row's task by its number above.\n\n" if card.multitask else ""
    longest = card.recipe.model.max_source_length
    if longest == "auto":
        longest = max((task.max_source_length for task in card.tasks), default=Task.max_source_length)
    new = card.recipe.model.max_target_length
    new = FREE_TEXT if new == "auto" else new
    return f"""{told}```python
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

base = {json.dumps(card.base_model)}
adapter = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.{card.recipe.model.dtype})
model = PeftModel.from_pretrained(model, adapter).eval()

texts = {json.dumps(texts, ensure_ascii=False, indent=4)}
rows = tokenizer(texts, truncation=True, max_length={longest}, padding=True, return_tensors="pt")
with torch.no_grad():
    ids = model.generate(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask{numbers}, max_new_tokens={new}
    )
print(tokenizer.batch_decode(ids, skip_special_tokens=True))
```

`bmtpt import --peft DIR --out DIR` makes a run of bmtpt_ds of it again."""


def _licence(card: Card) -> str:
    beside = "Beside it hold the licences of the base model and of the rows."
    return f"{'Not stated' if card.license == 'unknown' else card.license}. {beside}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
