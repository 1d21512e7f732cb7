"""The recipes that ship: they load, they are the paper's settings, and their headers say how to launch them."""

import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from bmtpt_ds.cli import command_line, main
from bmtpt_ds.config import Recipe, load_recipe
from bmtpt_ds.config.scale import load_scale
from bmtpt_ds.experiments.scaling.jobs import members_of
from bmtpt_ds.stage_inputs import adaptation_runs, source_tasks, target_tasks
from tests.benchmarks.study import SAME, STUDIES

RECIPES = Path(__file__).parents[1] / "bmtpt_ds" / "recipes"
NAMES = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
TABLES = [name for name in NAMES if name.startswith("table")]
GLUE = ["mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"]
SUPERGLUE = ["multirc", "boolq", "wic", "wsc", "cb"]
MRQA, OTHERS = ["nq", "hotpotqa", "searchqa", "newsqa"], ["winogrande", "yelp", "scitail", "paws"]
SOURCES = {"mnli", "qnli", "qqp", "sst2", "squad", "record"}
EXTRA = {"agnews", "commonsenseqa", "openbookqa", "arc", "anli", "winogrande"}

# where the row is in ../shared/paper/tables.yaml
ROWS = {
    "table1/single": ("table1", "single", "bmtpt"),
    "table1/multi_glue": ("table1", "multi", "bmtpt"),
    "table1/multi_superglue": ("table1", "multi", "bmtpt"),
    "table2/shots_4": ("table2", "k4", "bmtpt"),
    "table2/shots_16": ("table2", "k16", "bmtpt"),
    "table2/shots_32": ("table2", "k32", "bmtpt"),
    "table3/t5_large": ("table3", "t5_large"),
    "table3/t5_3b": ("table3", "t5_3b"),
    "table3/sampling_1": ("table3", "source_sampling_1"),
    "table3/sampling_2": ("table3", "source_sampling_2"),
    "table3/ten_particles": ("table3", "ten_particles"),
    "table3/no_prior": ("table3", "no_prior"),
    "table4/mrqa": ("table4", "bmtpt"),
    "table4/others": ("table4", "bmtpt"),
}


def text(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text()


def rows_a_step(recipe: Recipe) -> int:
    return recipe.source.particles * recipe.source.kappa * recipe.source.rows_per_task


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_its_tasks_exist(name: str) -> None:
    recipe = load_recipe(name)
    assert source_tasks(recipe) and target_tasks(recipe)
    assert text(name).startswith("# ")


def test_every_row_of_the_paper_has_a_recipe() -> None:
    assert set(ROWS) == set(TABLES)


@pytest.mark.parametrize("name", ["paper", *TABLES])
def test_the_rows_of_a_source_step_are_those_of_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    special = {"table3/sampling_1": 3 * 5, "table3/ten_particles": 6 * 10}
    assert rows_a_step(recipe) == special.get(name, 6 * 5)
    assert set(recipe.source.tasks) == (SOURCES | EXTRA if name == "table3/sampling_2" else SOURCES)
    assert recipe.source.steps == 100_000


def test_few_shot_is_what_the_study_found_at_the_papers_rows_a_step() -> None:
    recipe, rows = load_recipe("few_shot"), {"source.tasks_per_step", "source.rows_per_task"}
    assert rows_a_step(recipe) == 6 * 5
    for key, value in load_scale("study/core", []).variants["bmtpt"].items():
        here = functools.reduce(getattr, key.split("."), recipe)
        assert key in rows or here == type(here)(value), key
    study = load_recipe("study/base")
    assert (recipe.source.lr, recipe.target.lr_low_rank) == (study.source.lr, study.target.lr_low_rank)


@pytest.mark.parametrize("name", ["paper", *TABLES])
def test_the_target_stage_is_that_of_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    target = recipe.target
    expected = {"mrqa": MRQA, "others": OTHERS, "multi_glue": GLUE, "multi_superglue": SUPERGLUE}
    assert target.tasks == expected.get(name.rpartition("/")[2], GLUE + SUPERGLUE)
    assert target.multi == ("multi" in name)
    assert target.shots == (int(name.rpartition("_")[2]) if "shots" in name else None)
    third = 3 if target.shots == 4 else 1
    assert (target.lr_full, target.lr_low_rank) == (pytest.approx(0.3 / third), pytest.approx(0.4 / third))
    assert (target.prior, target.sigma) == ("none" if name == "table3/no_prior" else "gaussian", 1e5)
    assert (target.batch_size, recipe.prompt.length) == (32, 100)
    models = {"table3/t5_large": "google-t5/t5-large", "table3/t5_3b": "google-t5/t5-3b"}
    assert recipe.model.name_or_path == models.get(name, "google-t5/t5-base")
    assert recipe.model.max_source_length == "auto"


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_compares_costs_the_same(name: str) -> None:
    """The study's reader asserts it of finished runs; nobody should have to run one for hours to learn of a slip."""
    budgets, scale = STUDIES[name], load_scale(f"study/{name}", [])
    recipes = {m.variant: m.recipe for m in members_of(f"study/{name}", [], scale, None)}
    for steps, variants in budgets.steps.items():
        assert [recipes[variant].source.steps for variant in variants] == [steps] * len(variants)
    for passes, variants in budgets.row_passes.items():
        for variant in variants:
            source, method = recipes[variant].source, recipes[variant].method
            prompts = {"bmtpt": source.particles, "mpt": 3}.get(
                method, 1
            )  # mpt's: the teachers, the students, and both
            found = source.steps * prompts * source.kappa * source.rows_per_task
            assert found == pytest.approx(passes, rel=SAME), variant
    assert set(recipes) >= {v for group in (budgets.steps, budgets.row_passes) for vs in group.values() for v in vs}


def test_the_study_calls_one_thing_bmtpt() -> None:
    """`defaults` goes one level deep, which is taken by study/base, so that each grid says it."""
    grids = [f"study/{path.stem}" for path in RECIPES.glob("study/*.yaml")]
    variants = {name: load_scale(name, []).variants.get("bmtpt") for name in grids}
    said = {name: changes for name, changes in variants.items() if changes is not None}
    assert len(said) == 5 and all(changes == said["study/core"] for changes in said.values()), said


# --- headers ---------------------------------------------------------------------------------------------------------


def header(name: str) -> list[str]:
    return [line.removeprefix("#") for line in text(name).splitlines() if line.startswith("#")]


def launched(name: str) -> list[list[str]]:
    """The commands that a shell runs of a recipe's header, as their arguments after `--module bmtpt_ds`."""
    blocks = re.findall(r"(?:^   .+\n?)+", "\n".join(header(name)), re.M)
    shell = 'deepspeed() { printf "%q " "$@"; echo; }\n' + blocks[0]
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True, timeout=30)
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(command[:2] == ["--module", "bmtpt_ds"] for command in commands)
    return [command[2:] for command in commands]


@pytest.mark.parametrize("name", ["paper", *TABLES])
def test_the_commands_of_a_header_run_what_it_says(name: str) -> None:
    """A source stage, then all of the recipe's targets from its particles; each in a folder of its own."""
    (source, *adaptations) = [command_line().parse_args(arguments) for arguments in launched(name)]
    assert (source.command, source.resume) == ("source", True)
    assert source.config == ("paper" if str(source.run_dir) == "runs/paper" else name)
    ours, theirs = load_recipe(name), load_recipe(source.config)
    assert (ours.source, ours.model, ours.prompt) == (theirs.source, theirs.model, theirs.prompt)
    adapted = []
    for options in adaptations:
        assert (options.command, options.config, options.resume) == ("adapt", name, True)
        assert options.particles == str(source.run_dir)
        assert options.deepspeed_config == source.deepspeed_config
        chosen = load_recipe(options.config, options.set)
        runs = adaptation_runs(chosen).values()
        assert len(runs) == (3 * len(chosen.target.tasks) if "shots" in name else 1)
        adapted += dict.fromkeys(task for run in runs for task in run.target.tasks)
    assert adapted == ([] if name == "paper" else ours.target.tasks)
    folders = [options.run_dir for options in (source, *adaptations)]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", TABLES)
def test_check_says_what_would_be_downloaded(name: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["check", "--config", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    recipe = load_recipe(name)
    assert f"{rows_a_step(recipe)} rows through the model a step" in out
    assert all(f"{task}: will be downloaded" in out for task in [*recipe.source.tasks, *recipe.target.tasks])


@pytest.mark.shared
@pytest.mark.parametrize("name", TABLES)
def test_the_figures_of_a_header_are_the_paper_s(name: str, shared: Path) -> None:
    tables = yaml.safe_load((shared / "paper" / "tables.yaml").read_text())
    table, *path = ROWS[name]
    row = tables[table]
    for key in path:
        row = row[key]
    figures = dict(zip(tables[table]["columns"], row, strict=True))
    said = "\n".join(header(name)).rpartition("The paper (percent")[2]
    tasks = load_recipe(name).target.tasks
    for task in tasks:
        assert re.search(rf"\b{task} {figures[task]}\b", said), task
    groups = {"glue_avg": GLUE, "superglue_avg": SUPERGLUE, "mrqa_avg": MRQA, "others_avg": OTHERS}
    means = [str(figures[mean]) for mean, of in groups.items() if set(of) <= set(tasks)]
    assert re.findall(r"mean ([\d.]+)", said.partition("):")[2]) == means
