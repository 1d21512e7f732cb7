"""The commands of the two stages and of their prompts."""

import argparse

from bmtpt_ds.arguments import Parser, add_deepspeed, add_recipe, add_run_dir, add_set, given, given_path
from bmtpt_ds.commands.text_lines import answers_only, show
from bmtpt_ds.config import load_recipe, override_recipe
from bmtpt_ds.imports import quick_imports


def add_source(parser: Parser) -> None:
    command = parser.add_command(
        "source",
        _source,
        "learn the posterior of the source tasks: M particles, SVGD",
        "bmtpt source --config first_run --run-dir runs/source",
        "deepspeed --num_gpus 4 --module bmtpt_ds source --config first_run --run-dir runs/source "
        "--deepspeed_config zero3",
    )
    add_recipe(command)
    add_run_dir(command)


def _source(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    with quick_imports():
        from bmtpt_ds.commands.pipeline import run_source

    run_source(recipe, options.run_dir, options.deepspeed_config, resume=options.resume, overwrite=options.overwrite)


def add_adapt(parser: Parser) -> None:
    command = parser.add_command(
        "adapt",
        _adapt,
        "adapt the particles' mean to target tasks: one, several at once, runs side by side; validate, test once",
        "bmtpt adapt --config first_run --particles runs/source --run-dir runs/mrpc",
        "deepspeed --module bmtpt_ds adapt --config table1/multi_glue --particles runs/paper --run-dir runs/glue",
        "bmtpt adapt --config first_run --particles runs/source --run-dir runs/three --set target.seeds=[0,1,2]",
    )
    text = "a run of `source`; none: from vocabulary rows"
    add_recipe(command).add_argument("--particles", required=True, type=given, metavar="DIR|FILE|none", help=text)
    add_run_dir(command)


def _adapt(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    with quick_imports():
        from bmtpt_ds.commands.pipeline import run_adapt

    run_adapt(
        recipe,
        options.particles,
        options.run_dir,
        options.deepspeed_config,
        resume=options.resume,
        overwrite=options.overwrite,
    )


def add_evaluate(parser: Parser) -> None:
    command = parser.add_command(
        "evaluate",
        _evaluate,
        "score a run's prompt on a split",
        "bmtpt evaluate --prompt runs/mrpc --split test --json mrpc.json",
    )
    what = command.add_argument_group("what is scored")
    what.add_argument(
        "--prompt", required=True, type=given_path, metavar="DIR", help="a run of `adapt`, or of `source` (zero shots)"
    )
    what.add_argument("--task", nargs="+", default=[], help="tasks to score (default: those of the run)")
    what.add_argument("--split", choices=("validation", "test"), default="test", help="the rows to score")
    add_set(what)
    add_deepspeed(what)
    files = command.add_argument_group("what is written")
    files.add_argument("--json", type=given_path, metavar="FILE", help="the scores (0 to 100) as JSON")
    files.add_argument("--predictions", type=given_path, metavar="FILE", help="a JSON line for every row")


def _evaluate(options: argparse.Namespace) -> None:
    from bmtpt_ds.run_files import read_run_recipe

    trained, values = read_run_recipe(options.prompt)
    recipe = override_recipe(values, options.set, str(options.prompt))
    with quick_imports():
        from bmtpt_ds.commands.evaluate import run_evaluate

    table = run_evaluate(
        options.prompt,
        recipe,
        trained,
        options.task,
        options.split,
        options.deepspeed_config,
        options.json,
        options.predictions,
    )
    if table:
        show(table)


def add_predict(parser: Parser) -> None:
    command = parser.add_command(
        "predict",
        _predict,
        "answer texts of your own: a line in on stdin, a line out on stdout",
        "echo a warm and funny film | bmtpt predict --prompt runs/source --task sst2",
        "bmtpt predict --prompt runs/mrpc runs/rte < pairs.jsonl > answers",
        "deepspeed -q --num_gpus 2 --module bmtpt_ds predict --prompt runs/mrpc < pairs.jsonl",
    )
    command.description += (
        " A line is a text, which goes into the field of a task that has one; for a task that has several it is the "
        "whole text as it stands (sentence1: ... sentence2: ...). Or it is a JSON object with the task's columns. "
        'Several tasks: every one answers, tabs between the answers; a JSON line with "task": NAME gets that task\'s '
        "alone. A label is printed by its word, what is none as it was generated. Without -q the deepspeed launcher "
        "prints lines of its own between the answers."
    )
    what = command.add_argument_group("who answers")
    what.add_argument(
        "--prompt",
        required=True,
        nargs="+",
        type=given_path,
        metavar="DIR",
        help="runs of `adapt`, or of `source` (the particles' mean), all of one model",
    )
    what.add_argument(
        "--task", nargs="+", default=[], metavar="T", help="in the order of the answers (default: those of the prompts)"
    )
    add_set(what)
    add_deepspeed(what)


def _predict(options: argparse.Namespace) -> None:
    # before the libraries are imported that print on stdout
    with answers_only() as out:
        with quick_imports():
            from bmtpt_ds.commands.predict import run_predict

        run_predict(options.prompt, options.task, options.set, options.deepspeed_config, out)
