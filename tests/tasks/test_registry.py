"""The registry against the published table of tasks, and rows written as text."""

import json
import subprocess
import sys

import pytest

from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, Example, get_task
from bmtpt_ds.tasks.metrics import METRICS

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
CHOICES = "choice1 choice2 choice3 choice4 choice5"
# task: (hub repository, hub config, shown fields, label words by the hub's numbers, metrics, splits)
TABLE = {
    "sst2": (GLUE, "sst2", "sentence", "negative positive", "accuracy", "large"),
    "rte": (GLUE, "rte", "sentence1 sentence2", "entailment not_entailment", "accuracy", "small"),
    "cola": (GLUE, "cola", "sentence", "unacceptable acceptable", "accuracy matthews", "small"),
    "mrpc": (GLUE, "mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1", "small"),
    "qnli": (GLUE, "qnli", "question sentence", "entailment not_entailment", "accuracy", "large"),
    "qqp": (GLUE, "qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1", "large"),
    "mnli": (GLUE, "mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy", "matched"),
    "stsb": (GLUE, "stsb", "sentence1 sentence2", None, "pearson spearman", "small"),
    "boolq": (SUPER_GLUE, "boolq", "question passage", "False True", "accuracy", "small"),
    "cb": (SUPER_GLUE, "cb", "premise hypothesis", "entailment contradiction neutral", "accuracy macro_f1", "small"),
    "wic": (SUPER_GLUE, "wic", "sentence1 sentence2 word", "False True", "accuracy", "small"),
    "squad": ("rajpurkar/squad", None, "question context", None, "f1 exact_match", "large"),
    "multirc": (SUPER_GLUE, "multirc", "question answer paragraph", "False True", "f1a exact_match", "small"),
    "wsc": (SUPER_GLUE, "wsc.fixed", "text", "False True", "accuracy", "small"),
    "record": (SUPER_GLUE, "record", "query entities passage", None, "f1 exact_match", "large"),
    "nq": ("lucadiliello/naturalquestionsshortqa", None, "question context", None, "f1 exact_match", "large"),
    "hotpotqa": ("lucadiliello/hotpotqa", None, "question context", None, "f1 exact_match", "large"),
    "newsqa": ("lucadiliello/newsqa", None, "question context", None, "f1 exact_match", "large"),
    "searchqa": ("lucadiliello/searchqa", None, "question context", None, "f1 exact_match", "large"),
    "winogrande": (
        "allenai/winogrande",
        "winogrande_xl",
        "sentence option0 option1",
        "option0 option1",
        "accuracy",
        "large",
    ),
    "yelp": ("fancyzhx/yelp_polarity", None, "sentence", "negative positive", "accuracy", "large"),
    "scitail": ("allenai/scitail", "tsv_format", "premise hypothesis", "entailment neutral", "accuracy", "small"),
    "paws": (
        "google-research-datasets/paws",
        "labeled_final",
        "sentence1 sentence2",
        "not_equivalent equivalent",
        "accuracy",
        "own",
    ),
    "agnews": ("fancyzhx/ag_news", None, "sentence", "World Sports Business Science", "accuracy", "large"),
    "commonsenseqa": ("tau/commonsense_qa", None, f"question {CHOICES}", "A B C D E", "accuracy", "large"),
    "openbookqa": ("allenai/openbookqa", "main", f"question {CHOICES[:-8]}", "A B C D", "accuracy", "own"),
    "arc": ("allenai/ai2_arc", ("ARC-Easy", "ARC-Challenge"), f"question {CHOICES}", "A B C D E", "accuracy", "own"),
    "anli": ("facebook/anli", None, "premise hypothesis", "entailment neutral contradiction", "accuracy", "large"),
}
NOT_HERE = ("newsqa", "searchqa")  # the shared rows have none of these

# The first training row as the line's preprocessing writes it (of long rows the beginning of the source).
FIRST = {
    "sst2": Example("sentence: the little nuances ", "0"),
    "rte": Example(
        "sentence1: No Weapons of Mass Destruction Found in Iraq Yet. "
        "sentence2: Weapons of Mass Destruction Found in Iraq.",
        "1",
    ),
    "cola": Example("sentence: Our friends won't buy this analysis, let alone the next one we propose.", "1"),
    "mrpc": Example(
        'sentence1: Amrozi accused his brother , whom he called " the witness " , of deliberately distorting his '
        'evidence . sentence2: Referring to him as only " the witness " , Amrozi accused his brother of deliberately '
        "distorting his evidence .",
        "1",
    ),
    "qnli": Example(
        "question: What was distinctly made by Nintendo, Konami, and Acclaim? "
        "sentence: All licensed US cartridges were made by Nintendo, Konami and Acclaim.",
        "0",
    ),
    "qqp": Example(
        "question1: Where can I buy picture frames for photographic artwork in Ireland? "
        "question2: Where can I buy picture frames for photographic artwork?",
        "0",
    ),
    "mnli": Example(
        "premise: the initial regulatory flexibility analysis. hypothesis: Initial Regulatory Non-Flexibility Analysis",
        "2",
    ),
    "stsb": Example("sentence1: A plane is taking off. sentence2: An air plane is taking off.", "5.0"),
    "boolq": Example(
        "question: is ghost in the shell based on the anime passage: Ghost in the Shell -- Animation studio "
        "Production I.G has produced several different anime adaptations of Ghost in the Shell,",
        "0",
    ),
    "cb": Example(
        "premise: It was a complex language. Not written down but handed down. One might say it was peeled down. "
        "hypothesis: the language was peeled down",
        "0",
    ),
    "wic": Example(
        "sentence1: Do you want to come over to my place later? "
        "sentence2: A political system with no place for the less prominent groups. word: place",
        "0",
    ),
    "squad": Example(
        "question: For how many consecutive days did the PS3 Slim hold the number-one spot on Amazon.com? "
        "context: The PlayStation 3 Slim received extremely positive reviews as well as a boost in sales;",
        "fifteen",
    ),
    "multirc": Example(
        "question: What did Carl need before going to the lab answer: Tire paragraph: I'm here to tell", "1"
    ),
    "wsc": Example(
        "text: *Mark* told Pete many lies about himself, which Pete included in his book. "
        "#He# should have been more skeptical.",
        "0",
    ),
    "record": Example(
        "query: Speaking after the game, Mourinho said: 'The important thing is to give competition to the players, "
        "the best thing was that @placeholder made it difficult. entities: Hamish Mackay, Diego Costa, Kurt Zouma, ",
        "Olimpija Ljubljana",
    ),
    "nq": Example("question: when did the last volcano erupt in iceland context: The 2010 eruptions of Eyja", "2010"),
    "hotpotqa": Example(
        'question: "Wonderful Wonderful" is a song on the album of the same name which was released by this record '
        'company. context: "Wonderful Wonderful" is a song by American rock band The Killers',
        "Island Records",
    ),
    "winogrande": Example(
        "sentence: Sergey appreciated intricate designs and decided to keep the painting instead of the sculpture "
        "because the _ was interesting. option0: painting option1: sculpture",
        "0",
    ),
    "yelp": Example(
        "sentence: Just to let pple know.. I got burnt at this place, the burns turned into dark spots. "
        "Go to a dermatologist instead",
        "0",
    ),
    "scitail": Example(
        "premise: The polyanionic oligos may bind to proteins such as fibroblast growth factor and inhibit protein "
        "binding to cell surface receptors, thus inhibiting cell proliferation (29). "
        "hypothesis: Cells secrete factor that bind to receptors.",
        "1",
    ),
    "paws": Example(
        "sentence1: Jamie Syme is the older borther of the rugby league , and rugby union footballer ; Jason Syme . "
        "sentence2: Jason Jamie Syme is the older Borther of the Rugby - League and Rugby - Union - Footballers .",
        "1",
    ),
    "agnews": Example("sentence: Montgomery, Gaines doping cases postponed A hearing in the doping cases of US ", "1"),
    "commonsenseqa": Example(
        "question: The sanctions against the school were a punishing blow, and they seemed to what the efforts the "
        "school had made to change? "
        "choice1: ignore choice2: enforce choice3: authoritarian choice4: yell at choice5: avoid",
        "0",
    ),
    "openbookqa": Example(
        "question: The sun is responsible for choice1: puppies learning new tricks choice2: children growing up and "
        "getting old choice3: flowers wilting in a vase choice4: plants sprouting, blooming and wilting",
        "3",
    ),
    "arc": Example(
        "question: Which factor will most likely cause a person to develop a fever? "
        "choice1: a leg muscle relaxing after exercise choice2: a bacterial population in the bloodstream "
        "choice3: several viral particles on the skin choice4: carbohydrates being digested in the stomach",
        "1",
    ),
    "anli": Example(
        "premise: The Treaty of Berlin between the Habsburg archduchess Maria Theresa of Austria, who", "0"
    ),
}


LONG = ("boolq", "squad", "multirc", "record", "nq", "hotpotqa", "agnews", "anli")  # of which FIRST has the beginning


def test_table():
    assert set(TASKS) == set(TABLE)
    for name, (repository, config, fields, words, metrics, splits) in TABLE.items():
        task = TASKS[name]
        assert task.name == name
        assert (task.hub_repository, task.hub_configs) == (repository, config if name == "arc" else (config,))
        assert " ".join(part.shown for part in task.fields) == fields
        assert " ".join(task.metrics) == metrics
        assert set(task.metrics) <= set(METRICS[task.target.kind])
        assert task.split_rule == splits
        assert task.folder is None
        if words:
            assert task.label_texts("words") == task.answer_texts("words") == tuple(words.split())
            assert task.label_texts("digits") == tuple("01234"[: len(words.split())])
    plain = {"train": ("train",), "validation": ("validation",)}
    assert TASKS["mnli"].hub_splits.keys() == {"train", "validation_matched", "validation_mismatched"}
    assert TASKS["sst2"].hub_splits == TASKS["cola"].hub_splits == plain
    assert TASKS["paws"].hub_splits == plain | {"test": ("test",)}
    assert TASKS["yelp"].hub_splits == TASKS["agnews"].hub_splits == plain | {"validation": ("test",)}
    rounds = {"train": ("train_r1", "train_r2", "train_r3"), "validation": ("dev_r1", "dev_r2", "dev_r3")}
    assert TASKS["anli"].hub_splits == rounds


def test_columns():
    """Where they are not the shown names."""
    assert TASKS["rte"].columns == ("sentence1", "sentence2", "label")
    assert TASKS["yelp"].columns == TASKS["agnews"].columns == ("text", "label")
    assert TASKS["winogrande"].columns == ("sentence", "option1", "option2", "answer")
    assert TASKS["openbookqa"].columns == ("question_stem", "choices", "answerKey")
    assert TASKS["arc"].columns == TASKS["commonsenseqa"].columns == ("question", "choices", "answerKey")
    assert TASKS["multirc"].columns == ("question", "answer", "paragraph", "label", "idx")
    assert TASKS["wsc"].columns == ("text", "span1_text", "span1_index", "span2_text", "span2_index", "label")


def test_tasks_without_labels():
    for labels in ("digits", "words"):
        tenths = [0, 2, 4, 6, 8]
        texts = [f"{whole}.{tenth}" for whole in range(5) for tenth in tenths]
        assert TASKS["stsb"].answer_texts(labels) == (*texts, "5.0")
        assert TASKS["squad"].answer_texts(labels) is None
    for name, what in (("stsb", "numbers"), ("squad", "free text")):
        message = f"task {name} has no labels but {what}: set evaluate.scoring=generate"
        for refused in (TASKS[name].check_scoring, "labels"), (TASKS[name].label_texts, "words"):
            with pytest.raises(UserError) as caught:
                refused[0](refused[1])
            assert str(caught.value) == message
        TASKS[name].check_scoring("generate")
    TASKS["cb"].check_scoring("labels")


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_rows(name):
    """What `bmtpt tasks` shows, and where a reader looks up what the columns hold."""
    task = TASKS[name]
    assert set(task.sample) == set(task.columns)
    assert task.row_problem(dict(task.sample)) is None
    assert len(task.example(task.sample).source) < 100


def test_example_labels_and_prefix():
    row = {"premise": "A b.", "hypothesis": "C  d ", "label": 1, "idx": 7}
    mnli = get_task("mnli")
    assert mnli.example(row) == ("premise: A b. hypothesis: C  d ", "1")
    assert mnli.example(row, labels="words").target == "neutral"
    assert mnli.example(row, prefix=True).source == "mnli premise: A b. hypothesis: C  d "
    assert mnli.class_of(row) == mnli.reference(row) == 1
    assert get_task("cb").example(row, labels="words").target == "contradiction"  # another order than mnli's
    with pytest.raises(ValueError, match="labels"):
        mnli.example(row, labels="letters")


@pytest.mark.shared
@pytest.mark.parametrize("name", TABLE)
def test_first_real_row(shared, name):
    if name in NOT_HERE:
        pytest.skip("not among the shared rows")
    task, (source, target) = get_task(name), FIRST[name]
    with open(shared / "data" / (task.folders or (name,))[0] / "train.jsonl", encoding="utf-8") as file:
        row = json.loads(file.readline())
    written, answer = task.example(row)
    whole = len(written) if name in LONG else len(source)
    assert (written[: len(source)], len(written), answer) == (source, whole, target)
    assert task.example(row, prefix=True) == (f"{name} {written}", target)
    words = task.answer_texts("words")
    in_words = words[int(target)] if words and task.target.kind != "number" else target
    assert task.example(row, labels="words") == (written, in_words)


@pytest.mark.parametrize(
    ("wrong", "right"), [("sst-2", "sst2"), ("MNLI", "mnli"), ("mrcp", "mrpc"), ("mnli_mm", "mnli"), ("sts-b", "stsb")]
)
def test_misspelt_name(wrong, right):
    with pytest.raises(UserError) as caught:
        get_task(wrong)
    assert str(caught.value) == f"unknown task '{wrong}': did you mean {right}? (known: {', '.join(TASKS)})"


def test_unknown_name_without_a_near_one():
    with pytest.raises(UserError, match=r"unknown task 'xyz' \(known: sst2, "):
        get_task("xyz")


def test_importing_tasks_brings_no_heavy_library():
    code = (
        "import sys, bmtpt_ds.tasks, bmtpt_ds.tasks.metrics, bmtpt_ds.tasks.listing; "
        "print([m for m in ('torch', 'datasets', 'sklearn', 'scipy', 'numpy', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
