"""The built-in tasks, an entry each. A new task is a new entry here and nothing else."""

from typing import Any

from bmtpt_ds.tasks.fields import Choice, Field, Listed, MarkedSpans, Text
from bmtpt_ds.tasks.targets import ChoiceTarget, GroupedLabelTarget, LabelTarget, NumberTarget, Target, TextTarget
from bmtpt_ds.tasks.task import SplitRule, Task

_GLUE, _SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


def _task(
    name: str,
    hub: tuple[str, str | None],
    source: str | tuple[Field, ...],
    target: Target,
    metrics: str,
    splits: SplitRule,
    sample: dict[str, Any],
    **more: Any,
) -> Task:
    """A task of one configuration; `source` as text: the columns, `shown=column` where it is shown by another name."""
    repository, config = hub
    fields = source if isinstance(source, tuple) else tuple(Text(*word.split("=")) for word in source.split())
    configs = more.pop("hub_configs", (config,))
    return Task(name, repository, configs, fields, target, tuple(metrics.split()), splits, sample, **more)


def _label(*words: str, column: str = "label", values: tuple[str, ...] | None = None) -> LabelTarget:
    return LabelTarget(column, words, values=values)


def _choices(count: int) -> tuple[Field, ...]:
    return tuple(Choice(f"choice{place + 1}", place) for place in range(count))


def _choice(count: int) -> ChoiceTarget:
    return ChoiceTarget("answerKey", tuple("ABCDE"[:count]))


CATALOGUE: tuple[Task, ...] = (
    _task(
        "sst2",
        (_GLUE, "sst2"),
        "sentence",
        _label("negative", "positive"),
        "accuracy",
        "large",
        {"sentence": "a warm and funny film .", "label": 1},
    ),
    _task(
        "rte",
        (_GLUE, "rte"),
        "sentence1 sentence2",
        _label("entailment", "not_entailment"),
        "accuracy",
        "small",
        {"sentence1": "Anna sold her boat.", "sentence2": "Anna had a boat.", "label": 0},
    ),
    _task(
        "cola",
        (_GLUE, "cola"),
        "sentence",
        _label("unacceptable", "acceptable"),
        "accuracy matthews",  # the paper's row is accuracy, its peers' Matthews
        "small",
        {"sentence": "Anna are selling a boat.", "label": 0},
    ),
    _task(
        "mrpc",
        (_GLUE, "mrpc"),
        "sentence1 sentence2",
        _label("not_equivalent", "equivalent"),
        "accuracy f1",
        "small",
        {"sentence1": "Anna sold her boat .", "sentence2": "The boat was sold by Anna .", "label": 1},
    ),
    _task(
        "qnli",
        (_GLUE, "qnli"),
        "question sentence",
        _label("entailment", "not_entailment"),
        "accuracy",
        "large",
        {"question": "Who sold the boat?", "sentence": "The boat was red.", "label": 1},
    ),
    _task(
        "qqp",
        (_GLUE, "qqp"),
        "question1 question2",
        _label("not_duplicate", "duplicate"),
        "accuracy f1",
        "large",
        {"question1": "How do I sell a boat?", "question2": "How can I sell my boat?", "label": 1},
    ),
    _task(
        "mnli",
        (_GLUE, "mnli"),
        "premise hypothesis",
        _label("entailment", "neutral", "contradiction"),
        "accuracy",
        "matched",
        {"premise": "Anna sold her boat.", "hypothesis": "The boat was red.", "label": 1},
    ),
    _task(
        "stsb",
        (_GLUE, "stsb"),
        "sentence1 sentence2",
        NumberTarget("label", scale=(0.0, 5.0, 0.2), split=2.5),
        "pearson spearman",
        "small",
        {"sentence1": "Anna sold a boat.", "sentence2": "Anna bought a boat.", "label": 2.25},
    ),
    _task(
        "boolq",
        (_SUPER_GLUE, "boolq"),
        "question passage",
        _label("False", "True"),
        "accuracy",
        "small",
        {"question": "is a raft a boat", "passage": "Raft -- A raft is the simplest kind of boat.", "label": 1},
    ),
    _task(
        "cb",
        (_SUPER_GLUE, "cb"),
        "premise hypothesis",
        _label("entailment", "contradiction", "neutral"),  # not the order of mnli
        "accuracy macro_f1",
        "small",
        {"premise": "I doubt that Anna sold the boat.", "hypothesis": "Anna sold the boat.", "label": 1},
    ),
    _task(
        "wic",
        (_SUPER_GLUE, "wic"),
        "sentence1 sentence2 word",
        _label("False", "True"),
        "accuracy",
        "small",
        {"sentence1": "The bank of the river.", "sentence2": "Money in the bank.", "word": "bank", "label": 0},
    ),
    _task(
        "squad",
        ("rajpurkar/squad", None),
        "question context",
        TextTarget("answers", inner="text"),
        "f1 exact_match",
        "large",
        {"question": "Who sold the boat?", "context": "In May Anna sold it.", "answers": {"text": ["Anna"]}},
        max_source_length=512,
    ),
    _task(
        "multirc",
        (_SUPER_GLUE, "multirc"),
        (Text("question"), Text("answer"), Text("paragraph", tags=True)),
        GroupedLabelTarget("label", ("False", "True"), group=(("idx", "paragraph"), ("idx", "question"))),
        "f1a exact_match",
        "small",
        {
            "question": "Who sold the boat?",
            "answer": "Anna",
            "paragraph": "<b>Sent 1: </b>Anna sold it.",
            "label": 1,
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
        },
        group=("idx", "paragraph"),
        max_source_length=348,
    ),
    _task(
        "wsc",
        (_SUPER_GLUE, "wsc.fixed"),
        (MarkedSpans("text"),),
        _label("False", "True"),
        "accuracy",
        "small",
        {
            "text": "Anna sold the boat because it was old.",
            "span1_text": "the boat",
            "span1_index": 2,
            "span2_text": "it",
            "span2_index": 5,
            "label": 1,
        },
    ),
    _task(
        "record",
        (_SUPER_GLUE, "record"),
        (Text("query"), Listed("entities"), Text("passage")),
        TextTarget("answers", drawn=True),
        "f1 exact_match",
        "large",
        {
            "query": "@placeholder sold the boat.",
            "entities": ["Anna", "Ben"],
            "passage": "Anna met Ben.",
            "answers": ["Anna"],
        },
    ),
    *(
        _task(
            name,
            (f"lucadiliello/{repository}", None),
            "question context",
            TextTarget("answers"),
            "f1 exact_match",
            "large",
            {"question": "Who sold the boat?", "context": "In May Anna sold it.", "answers": ["Anna"]},
            max_source_length=512,
        )
        for name, repository in (
            ("nq", "naturalquestionsshortqa"),
            ("hotpotqa", "hotpotqa"),
            ("newsqa", "newsqa"),
            ("searchqa", "searchqa"),
        )
    ),
    _task(
        "winogrande",
        ("allenai/winogrande", "winogrande_xl"),
        "sentence option0=option1 option1=option2",
        _label("option0", "option1", column="answer", values=("1", "2")),
        "accuracy",
        "large",
        {"sentence": "Anna sold the boat as _ was old.", "option1": "Anna", "option2": "the boat", "answer": "2"},
    ),
    _task(
        "yelp",
        ("fancyzhx/yelp_polarity", None),
        "sentence=text",
        _label("negative", "positive"),
        "accuracy",
        "large",
        {"text": "Friendly people, and the soup was hot.", "label": 1},
        hub_names={"validation": "test"},
        most_train=100_000,
    ),
    _task(
        "scitail",
        ("allenai/scitail", "tsv_format"),
        "premise hypothesis",
        _label("entailment", "neutral", values=("entails", "neutral")),
        "accuracy",
        "small",
        {"premise": "Boats float on water.", "hypothesis": "Boats can float.", "label": "entails"},
    ),
    _task(
        "paws",
        ("google-research-datasets/paws", "labeled_final"),
        "sentence1 sentence2",
        _label("not_equivalent", "equivalent"),
        "accuracy",
        "own",
        {"sentence1": "Anna met Ben at Kiel .", "sentence2": "Ben met Anna at Kiel .", "label": 1},
    ),
    _task(
        "agnews",
        ("fancyzhx/ag_news", None),
        "sentence=text",
        _label("World", "Sports", "Business", "Science"),
        "accuracy",
        "large",
        {"text": "Shares of boat builders rose on Monday.", "label": 2},
        hub_names={"validation": "test"},
    ),
    _task(
        "commonsenseqa",
        ("tau/commonsense_qa", None),
        (Text("question"), *_choices(5)),
        _choice(5),
        "accuracy",
        "large",
        {
            "question": "Where is a boat?",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sky", "oven", "lake", "attic", "moon"]},
            "answerKey": "C",
        },
    ),
    _task(
        "openbookqa",
        ("allenai/openbookqa", "main"),
        (Text("question", "question_stem"), *_choices(4)),
        _choice(4),
        "accuracy",
        "own",
        {
            "question_stem": "A boat floats on",
            "choices": {"label": ["A", "B", "C", "D"], "text": ["air", "water", "sand", "light"]},
            "answerKey": "B",
        },
    ),
    _task(
        "arc",
        ("allenai/ai2_arc", None),
        (Text("question"), *_choices(5)),
        _choice(5),
        "accuracy",
        "own",
        {
            "question": "What makes a boat float?",
            "choices": {"label": ["1", "2", "3"], "text": ["paint", "displaced water", "its name"]},
            "answerKey": "2",
        },
        hub_configs=("ARC-Easy", "ARC-Challenge"),
        folders=("arc_easy", "arc_challenge"),
    ),
    _task(
        "anli",
        ("facebook/anli", None),
        "premise hypothesis",
        _label("entailment", "neutral", "contradiction"),
        "accuracy",
        "large",
        {"premise": "Anna sold her boat.", "hypothesis": "The boat was red.", "label": 1},
        hub_names={"train": "train_r1 train_r2 train_r3", "validation": "dev_r1 dev_r2 dev_r3"},
    ),
)
