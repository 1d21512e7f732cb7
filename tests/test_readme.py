"""README's commands parse, its recipes load, its links lead somewhere, its own task reads as it says."""

import json
import re
import shlex
from pathlib import Path

import pytest

from bmtpt_ds.cli import command_line
from bmtpt_ds.config import load_recipe
from bmtpt_ds.tasks import TASKS, get_task

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    """Lines of the bash blocks, and what stands between backticks and begins like a command that takes options."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    inline = re.findall(r"`((?:bmtpt|deepspeed) [^`]*--[^`]*)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
    return [*lines, *inline]


def our_arguments(command: str) -> list[str] | None:
    """What `bmtpt` gets of a command line, a launcher's too; None of another program's."""
    last = command.rpartition("|")[2] if command.startswith("echo") else command
    words = shlex.split(last, comments=True)
    for name in ("bmtpt", "bmtpt_ds", "launchers/slurm.sbatch", "--"):
        if name in words:
            return [word for word in words[words.index(name) + 1 :] if word not in ("<", "...")]
    return None


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    arguments = our_arguments(command)
    if arguments is None:
        script = re.match(r"bash (\S+)", command)
        assert script and (ROOT / script[1]).is_file()
    elif "--help" not in arguments and not command.startswith("deepspeed --hostfile"):
        if "--prompt" in arguments and arguments[-1].endswith(".jsonl") and arguments[0] == "predict":
            arguments.pop()  # stdin's file
        if arguments[0] in ("adapt", "source") and "--run-dir" not in arguments:
            arguments += ["--config", "first_run", "--run-dir", "x"]  # named in passing
        options = command_line().parse_args(arguments)
        assert callable(options.run)


def test_there_are_commands() -> None:
    named = {(our_arguments(command) or [""])[0] for command in commands()}
    assert {"check", "source", "adapt", "evaluate", "predict", "prepare", "tasks"} <= named


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipe_loads(block: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    for name in [*recipe.source.tasks, *recipe.target.tasks]:
        get_task(name, recipe.data.tasks)


def test_own_task_reads_as_it_says(tmp_path: Path) -> None:
    (block,) = (b for b in blocks("yaml") if "reviews" in b)
    (tmp_path / "recipe.yaml").write_text(block)
    task = get_task("reviews", load_recipe(str(tmp_path / "recipe.yaml")).data.tasks)
    row = json.loads(re.search(r"`(\{\"text\".*?\})`", README)[1])
    assert task.row_problem(row) is None
    example = task.example(row, "digits")
    assert f"`{example.source}` and writes `{example.target}`" in README.replace("\n", " ")
    assert task.example(row, "words").target == "bad"


def test_all_tasks_are_named() -> None:
    (listed,) = re.findall(r"lists all tasks: (.*?)\.", README, re.S)
    assert [name.strip() for name in listed.split(",")] == list(TASKS)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link).exists()]
