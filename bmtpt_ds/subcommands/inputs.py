"""The commands around the inputs of a run: rows prepared, recipes looked over, tasks listed."""

import argparse

from bmtpt_ds.arguments import Parser, add_deepspeed, add_recipe, given, given_path
from bmtpt_ds.commands.text_lines import show
from bmtpt_ds.config import load_recipe
from bmtpt_ds.imports import quick_imports


def add_prepare(parser: Parser) -> None:
    command = parser.add_command(
        "prepare",
        _prepare,
        "read, split and tokenise a recipe's tasks into a folder, for machines without network",
        "bmtpt prepare --config first_run --out runs/data",
        "bmtpt source --config first_run --set data.root=runs/data --run-dir runs/source",
    )
    group = add_recipe(command)
    group.add_argument("--out", required=True, type=given_path, metavar="DIR", help="the folder to write, new or empty")
    group.add_argument("--overwrite", action="store_true", help="replace what `prepare` has written in DIR")


def _prepare(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    with quick_imports():
        from bmtpt_ds.commands.prepare import run_prepare

    run_prepare(recipe, options.out, overwrite=options.overwrite)


def add_check(parser: Parser) -> None:
    command = parser.add_command(
        "check",
        _check,
        "look a recipe and a DeepSpeed JSON over without running anything, on any machine",
        "bmtpt check --config first_run --set data.root=FOLDER --deepspeed_config zero3",
        "deepspeed --hostfile hosts --module -- bmtpt_ds check --config paper --launch",
    )
    command.description += " Local rows are read, all of them; nothing is downloaded. The last line is ok."
    group = add_recipe(command)
    add_deepspeed(group)
    group.add_argument(
        "--launch",
        action="store_true",
        help="meet the other ranks of a launched job, and compare versions, devices, model and rows of its nodes",
    )


def _check(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    if options.launch:
        with quick_imports():
            from bmtpt_ds.commands.check_launch import check_launch

        if summary := check_launch(recipe, options.deepspeed_config):
            show(summary)
        return
    from bmtpt_ds.commands.check import check_recipe

    show(check_recipe(recipe, options.config, options.deepspeed_config))


def add_tasks(parser: Parser) -> None:
    command = parser.add_command(
        "tasks",
        _tasks,
        "list the tasks: rows, columns, answers, metrics, splits, an example of the text",
        "bmtpt tasks",
        "bmtpt tasks mnli squad",
        "bmtpt tasks --config my_recipe.yaml reviews",
    )
    what = command.add_argument_group("what is listed")
    what.add_argument("names", nargs="*", metavar="NAME", help="tasks to list; without any: all")
    what.add_argument(
        "--config",
        type=given,
        metavar="RECIPE",
        help="a recipe whose own tasks (data.tasks) are listed too (default: no recipe)",
    )


def _tasks(options: argparse.Namespace) -> None:
    own = load_recipe(options.config).data.tasks if options.config else {}
    from bmtpt_ds.tasks.listing import list_tasks

    show(list_tasks(options.names, own))
