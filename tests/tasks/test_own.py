"""Tasks of a recipe's own: from YAML to text, labels and metrics."""

import pytest

from bmtpt_ds.config import load_recipe
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, all_tasks, get_task

REVIEWS = """
data:
  tasks:
    reviews:
      folder: my/reviews
      source: {review: text, seller: shop}
      target: stars
      labels: [bad, good]
      metrics: [f1, accuracy]
"""


def tasks_of(tmp_path, text, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(str(path), list(overrides)).data.tasks


def task_of(tmp_path, keys):
    return get_task("mine", tasks_of(tmp_path, f"data: {{tasks: {{mine: {keys}}}}}"))


def test_labels(tmp_path):
    own = tasks_of(tmp_path, REVIEWS)
    task = get_task("reviews", own)
    assert (task.name, task.folder, task.hub_repository) == ("reviews", "my/reviews", None)
    assert task.columns == ("text", "shop", "stars")
    assert task.metrics == ("f1", "accuracy")
    row = {"shop": "Foo", "text": "Nice.", "stars": "good", "more": 1}
    assert task.row_problem(row) is None
    assert task.example(row) == ("review: Nice. seller: Foo", "1")
    assert task.example(row, labels="words", prefix=True) == ("reviews review: Nice. seller: Foo", "good")
    assert task.answer_texts("words") == ("bad", "good")
    assert (task.class_of(row), task.reference(row)) == (1, 1)
    assert list(all_tasks(own)) == [*TASKS, "reviews"]
    assert get_task("rte", own) is TASKS["rte"]


def test_the_order_of_the_fields_is_the_recipes_and_survives_config_yaml(tmp_path):
    own = tasks_of(tmp_path, "data: {tasks: {mine: {source: {z: b, a: z, m: a}, target: t}}}")
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert get_task("mine", own).example({"a": "1", "b": "2", "z": "3", "t": "x"}).source == "z: 2 a: 3 m: 1"
    assert tasks_of(tmp_path, recipe.to_yaml()) == own
    assert list(tasks_of(tmp_path, recipe.to_yaml())["mine"].source) == ["z", "a", "m"]


def test_columns_under_their_own_names(tmp_path):
    task = task_of(tmp_path, "{source: [b, a], target: t}")
    assert [(part.shown, part.columns) for part in task.fields] == [("b", ("b",)), ("a", ("a",))]
    assert task.folder is None


def test_free_text(tmp_path):
    task = task_of(tmp_path, "{source: [article], target: summary}")
    assert (task.target.kind, task.metrics) == ("text", ("exact_match", "f1"))
    assert task.example({"article": "Long.", "summary": "Short."}).target == "Short."
    assert task.reference({"article": "Long.", "summary": ["Short.", "Brief."]}) == ("Short.", "Brief.")
    assert task.answer_texts("words") is None
    assert task_of(tmp_path, "{source: [article], target: summary, metrics: [f1]}").metrics == ("f1",)


def test_numbers(tmp_path):
    task = task_of(tmp_path, "{source: [text], target: price, metrics: [spearman, pearson]}")
    assert (task.target.kind, task.metrics) == ("number", ("spearman", "pearson"))
    assert task.example({"text": "A boat.", "price": 12.5}).target == "12.5"
    assert task.row_problem({"text": "A boat.", "price": "much"}) == "column 'price' must be a number, not 'much'"


def test_labels_written_as_numbers_in_yaml(tmp_path):
    task = task_of(tmp_path, "{source: [text], target: stars, labels: [1, 2, 3, 4, 5]}")
    assert task.answer_texts("words") == ("1", "2", "3", "4", "5")
    assert task.example({"text": "Nice.", "stars": 5}, labels="words").target == "5"
    assert task.example({"text": "Nice.", "stars": 5}, labels="digits").target == "4"  # the label's number


@pytest.mark.parametrize("kind", ["labels: [a, b, c]", "metrics: [pearson]", "labels: ['no', 'yes']", ""])
def test_the_sample_of_a_listing_is_a_row(tmp_path, kind):
    task = task_of(tmp_path, f"{{source: {{shown: text, other: more}}, target: t, {kind}}}")
    assert set(task.sample) == {"text", "more", "t"}
    assert task.row_problem(dict(task.sample)) is None
    assert task.example(task.sample).source == "shown: <text> other: <more>"


LABELS = "source: [text], target: stars, labels: [bad, good]"
MISTAKES = {
    "no source": ("{target: t}", "data.tasks.mine.source is missing; give it"),
    "no target": ("{source: [text]}", "data.tasks.mine.target is missing; give it"),
    "nothing": ("null", "data.tasks.mine: input should be a section of keys (got None)"),
    "key": ("{source: [text], target: t, lables: [a, b]}", "unknown key data.tasks.mine.lables: did you mean labels?"),
    "misspelt target": ("{source: [a], taget: t}", "unknown key data.tasks.mine.taget: did you mean target?"),
    "strange key": ("{source: [text], target: t, xyz: 1}", "unknown key data.tasks.mine.xyz (known: folder, source, "),
    "empty source": ("{source: [], target: t}", "data.tasks.mine.source: no column is named: name at least one"),
    "source twice": ("{source: [a, b, a], target: t}", "data.tasks.mine.source: names a more than once"),
    "source of text": ("{source: text, target: t}", "data.tasks.mine.source: input should be a valid dictionary or "),
    "source of number": ("{source: {a: 1}, target: t}", "data.tasks.mine.source: input should be a valid string"),
    "target in source": ("{source: {a: t}, target: t}", "data.tasks.mine: the text would show the answer: "),
    "one label": ("{source: [text], target: t, labels: [a]}", "data.tasks.mine.labels: should be at least two"),
    "label twice": ("{source: [text], target: t, labels: [a, b, a]}", "mine.labels: names a more than once"),
    "empty label": ("{source: [text], target: t, labels: [a, '']}", "mine.labels: no label may be empty"),
    "space in label": ("{source: [text], target: t, labels: [a, 'b ']}", "or begin or end with white space"),
    "labels yes and no": ("{source: [text], target: t, labels: [no, yes]}", 'put quotes around them, "no"'),
    "labels of a mapping": ("{source: [text], target: t, labels: {a: 0}}", "mine.labels: input should be a valid list"),
    "metric": (f"{{{LABELS}, metrics: [acuracy]}}", "mine.metrics: unknown metric 'acuracy': did you mean accuracy?"),
    "metric twice": (f"{{{LABELS}, metrics: [f1, f1]}}", "data.tasks.mine.metrics: names f1 more than once"),
    "metric of labels": (
        "{source: [text], target: t, metrics: [accuracy]}",
        "mine.metrics: accuracy does not fit free text (no labels are given); take f1 or exact_match",
    ),
    "metric of numbers": (f"{{{LABELS}, metrics: [accuracy, pearson]}}", "metrics: pearson does not fit labels; take "),
    "metric of text": (
        "{source: [text], target: t, metrics: [pearson, f1]}",
        "mine.metrics: f1 does not fit numbers; take pearson or spearman",
    ),
    "metric of two labels": (
        "{source: [text], target: t, labels: [a, b, c], metrics: [f1]}",
        "mine.metrics: f1 is of two labels and there are 3; take accuracy or macro_f1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name):
    keys, part = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        task_of(tmp_path, keys)
    message = str(caught.value)
    assert part in message and "\n" not in message and len(message) < 300
    # any task of the recipe asks for all of them: a mistake shows whichever task a command begins with
    with pytest.raises(UserError):
        get_task("rte", tasks_of(tmp_path, f"data: {{tasks: {{mine: {keys}}}}}"))


@pytest.mark.parametrize("name", ["a b", "../x", "a.b", "", "-a", "é"])
def test_names_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match=r"data\.tasks: a task's name is of letters, digits, _ and -; rename "):
        tasks_of(tmp_path, f"data: {{tasks: {{'{name}': {{source: [a], target: t}}}}}}")


@pytest.mark.parametrize("name", ["mean", "best", "best_step"])
def test_names_that_the_log_needs(tmp_path, name):
    with pytest.raises(UserError, match=rf"data\.tasks: the log calls something else '{name}'; rename the task"):
        tasks_of(tmp_path, f"data: {{tasks: {{{name}: {{source: [a], target: t}}}}}}")


def test_a_number_as_a_name(tmp_path):
    with pytest.raises(UserError, match=r"data\.tasks\.2024: input should be a valid string \(got 2024\)"):
        tasks_of(tmp_path, "data: {tasks: {2024: {source: [a], target: t}}}")


def test_a_built_in_tasks_name_is_refused(tmp_path):
    own = tasks_of(tmp_path, "data: {tasks: {squad: {source: [a], target: t}}}")
    with pytest.raises(UserError) as caught:
        get_task("rte", own)
    assert str(caught.value) == "data.tasks.squad: a built-in task has that name; choose another"


def test_misspelt_own_name(tmp_path):
    own = tasks_of(tmp_path, REVIEWS)
    with pytest.raises(UserError, match=r"unknown task 'review': did you mean reviews\? \(known: sst2, .*, reviews\)"):
        get_task("review", own)


def test_overrides_reach_into_a_task(tmp_path):
    own = tasks_of(tmp_path, REVIEWS, "data.tasks.reviews.folder=elsewhere", "data.tasks.reviews.labels=[poor, fine]")
    assert get_task("reviews", own).folder == "elsewhere"
    assert get_task("reviews", own).answer_texts("words") == ("poor", "fine")
    with pytest.raises(UserError, match=r"unknown key data\.tasks\.reviews\.foldr: did you mean folder\?"):
        tasks_of(tmp_path, REVIEWS, "data.tasks.reviews.foldr=x")
