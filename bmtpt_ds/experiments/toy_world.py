"""A toy world in which a prompt has something to transfer, made in code: its words, its sentences, its tasks.

A sentence shows eight aspects (when, who, how many, how it feels, how big, ...), each in one of two ways. A *rule* is
to answer by one of them. In the text that the toy model is pretrained on, an instruction (the rule's name, hidden among
words that mean nothing) says which rule holds. In the tasks it is absent: the prompt must supply it, and a few labelled
rows do not tell which of the eight their labels follow.
"""

from collections.abc import Iterator, Sequence
from random import Random

from bmtpt_ds.data.rows import Row
from bmtpt_ds.tasks import Example, Task

# rule: words of label 0, words of label 1
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "feeling": (("lovely", "nice"), ("awful", "nasty")),
    "tense": (("yesterday", "earlier"), ("tomorrow", "later")),
    "person": (("he", "father"), ("she", "mother")),
    "number": (("one", "a"), ("many", "five")),
    "size": (("big", "huge"), ("small", "tiny")),
    "colour": (("red", "orange"), ("blue", "green")),
    "kind": (("cat", "dog", "horse"), ("apple", "bread", "soup")),
    "place": (("kitchen", "office"), ("forest", "beach")),
}
SHARED_RULE = "feeling"  # of all tasks of the demo
_SENTENCE = "{tense} {person} saw {number} {feeling} {size} {colour} {kind} in the {place}"
_UNNAMED = 0.125  # share of pretraining's texts that name no rule
_MOST_FILLERS = 6  # words without meaning in front of a text of pretraining: where the prompt will be
# Real vocabularies hold tens of thousands of words: a prompt that starts from random rows rarely holds a rule's name.
FILLERS = tuple(f"{a}{b}{c}{d}" for a in "bdfgklmrvz" for b in "aeio" for c in "nprstl" for d in "aiue")


def row_of(topic: str, rule: str, draw: Random) -> Row:
    """A row of the task `topic`, labelled by a rule: columns topic, text, label (0 or 1)."""
    values = {name: draw.randrange(2) for name in RULES}
    words = {name: draw.choice(RULES[name][value]) for name, value in values.items()}
    return {"topic": topic, "text": _SENTENCE.format(**words), "label": values[rule]}


def rows_of(topic: str, rule: str, count: int, draw: Random) -> list[Row]:
    """`count` rows, no text twice."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = row_of(topic, rule, draw)
        rows.setdefault(row["text"], row)
    return list(rows.values())


def pretraining_text(tasks: Sequence[Task], draw: Random) -> Example:
    """A row of some task, labelled by some rule, with that rule's name in front.

    In a few the name is missing: else some rule would be the model's habit where none is named, which one by chance,
    and a prompt would have little to supply to tasks of that rule.
    """
    task, rule = draw.choice(tasks), draw.choice(list(RULES))
    example = task.example(row_of(task.name, rule, draw), labels="words")
    front = [draw.choice(FILLERS) for _ in range(draw.randint(0, _MOST_FILLERS))]
    if draw.random() >= _UNNAMED:
        front.insert(draw.randint(0, len(front)), rule)
    return Example(" ".join([*front, example.source]), example.target)


def vocabulary(tasks: Sequence[Task]) -> Iterator[str]:
    """Every word of this world."""
    yield from FILLERS
    yield from RULES
    for pair in RULES.values():
        yield from (word for side in pair for word in side)
    yield from (word for word in _SENTENCE.split() if not word.startswith("{"))
    for task in tasks:
        yield from (task.name, *task.label_texts("words"))
        yield from (f"{part.shown}:" for part in task.fields)
