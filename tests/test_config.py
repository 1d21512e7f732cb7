from pathlib import Path

import pytest

from bmtpt_ds.config import Recipe, load_recipe
from bmtpt_ds.config.yaml_text import parse_yaml
from bmtpt_ds.errors import UserError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_paper() -> None:
    recipe = Recipe()
    assert (recipe.source.particles, recipe.source.steps, recipe.prompt.length) == (5, 100_000, 100)
    assert (recipe.target.lr_full, recipe.target.lr_low_rank, recipe.target.batch_size) == (0.3, 0.4, 32)
    assert (recipe.target.sigma, recipe.target.prior) == (1e5, "gaussian")


@pytest.mark.parametrize("text", ["1e5", "1E5", "1.e5", "100000", "1e+5", ".1e6"])
def test_exponents_are_numbers(text: str) -> None:
    assert parse_yaml(f"x: {text}", "text") == {"x": 1e5}


def test_anchors_merge_and_a_key_given_twice_is_still_a_mistake() -> None:
    text = "a: &one {x: 1, y: 2}\nb: &two {<<: *one, y: 3}\nc: {<<: *two, x: 4}"
    assert parse_yaml(text, "text") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 4, "y": 3}}
    with pytest.raises(UserError, match=r"^text, line 2: .*'x' is given twice"):
        parse_yaml("a: &one {x: 1}\nb: {<<: *one, x: 2, x: 3}", "text")
    with pytest.raises(UserError, match="key True is given twice"):
        parse_yaml("yes: 1\ntrue: 2", "text")


def test_an_override_leaves_alone_what_an_alias_shares_with_it(tmp_path: Path) -> None:
    task = "{source: {review: text}, target: stars, labels: [bad, good], folder: here}"
    path = write(tmp_path / "recipe.yaml", f"data: {{tasks: {{books: &one {task}, films: *one}}}}\n")
    tasks = load_recipe(str(path), ["data.tasks.books.folder=there"]).data.tasks
    assert [tasks[name].folder for name in ("books", "films")] == ["there", "here"]


@pytest.mark.parametrize("name", ["1e-3", "3E4", "5e1", "1.5e+3", "1e", "0x1f", "yes", "null", "2026-11-27"])
def test_texts_that_look_like_something_else_are_written_so_that_they_stay_texts(tmp_path: Path, name: str) -> None:
    recipe = load_recipe("paper", [f'run.name="{name}"'])
    assert recipe.run.name == name
    assert load_recipe(str(write(tmp_path / "config.yaml", recipe.to_yaml())), []) == recipe


def test_overrides_reach_nested_keys_and_read_yaml(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "source: {tasks: [sst2], svgd: {damping: none}}")
    recipe = load_recipe(file, ["source.svgd.bandwidth=median", "source.tasks=[rte, cola]", "source.lr=1e-3"])
    svgd = recipe.source.svgd
    assert (svgd.bandwidth, svgd.damping, svgd.repulsion_scale, svgd.backend) == ("median", "none", 1.0, "auto")
    assert recipe.source.tasks == ["rte", "cola"]
    assert recipe.source.lr == 1e-3


def test_defaults_take_another_recipes_values_one_level(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "source: {tasks: [sst2], lr: 0.1}")
    child = write(tmp_path / "child.yaml", "defaults: base\nsource: {lr: 0.2}")
    recipe = load_recipe(child)
    assert (recipe.source.tasks, recipe.source.lr) == (["sst2"], 0.2)
    grandchild = write(tmp_path / "grandchild.yaml", "defaults: child")
    with pytest.raises(UserError, match="one level"):
        load_recipe(grandchild)


def test_shipped_recipes_are_found_where_a_folder_has_their_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "paper").mkdir()
    write(tmp_path / "mine.yaml", "defaults: paper\nrun: {seed: 3}")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("paper").source.steps == load_recipe("mine.yaml").source.steps == 100_000
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="recipe other: that is a folder"):
        load_recipe("other")


def test_own_tasks_are_taken_over_from_defaults(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "data: {tasks: {mine: {source: [text], target: t}, other: {source: [x], target: t}}}")
    child = write(tmp_path / "child.yaml", "defaults: base\ndata: {root: rows, tasks: {mine: {folder: my/rows}}}")
    tasks = load_recipe(child).data.tasks
    assert list(tasks) == ["mine", "other"]
    assert tasks["mine"].model_dump(exclude_defaults=True) == {"folder": "my/rows", "source": ["text"], "target": "t"}
    assert Recipe().data.tasks == {}


def test_kappa_is_all_tasks_unless_said(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "source: {tasks: [sst2, rte, cola]}")
    assert load_recipe(file).source.kappa == 3
    assert load_recipe(file, ["source.tasks_per_step=2"]).source.kappa == 2


@pytest.mark.parametrize("about", ["", "stage: source\n", "stage: adapt\nparticles: runs/source\n"])
def test_resolved_recipe_reads_back_the_same(tmp_path: Path, about: str) -> None:
    recipe = load_recipe("first_run", ["target.sigma=1e5"])
    again = write(tmp_path / "config.yaml", about + recipe.to_yaml())  # as a run writes it
    assert load_recipe(again) == recipe
    assert load_recipe(write(tmp_path / "child.yaml", "defaults: config")) == recipe
