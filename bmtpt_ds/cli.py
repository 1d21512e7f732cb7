"""The command line: parses, calls one function, prints."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bmtpt_ds import __version__
from bmtpt_ds.arguments import Parser, add_deepspeed, add_recipe, add_run_dir, add_set, given, given_path
from bmtpt_ds.commands.text_lines import answers_only, end_output, show
from bmtpt_ds.config import load_recipe, override_recipe
from bmtpt_ds.errors import UserError
from bmtpt_ds.imports import quick_imports
from bmtpt_ds.quiet import is_first_rank, let_first_rank_speak, print_line, quieten
from bmtpt_ds.stopping import Stopped

_EPILOG = (
    "Example:\n  bmtpt source --config first_run --run-dir runs/source\n\n"
    "What a command takes: bmtpt COMMAND --help. A model or a dataset named as on the Hugging Face hub is downloaded "
    "once and from then on taken from its cache (HF_HOME); HF_HUB_OFFLINE=1 forbids all requests."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0, 2 for a user's mistake (one line on stderr), 128 + signal when stopped."""
    options = command_line().parse_args(arguments)
    quieten(verbose=getattr(options, "verbose", False))
    try:
        options.run(options)
        return 0
    except UserError as mistake:
        if is_first_rank():
            # names of files, and what libraries say, may hold line breaks
            print_line(f"bmtpt {options.command}: {' '.join(str(mistake).splitlines())}")
        else:
            let_first_rank_speak()
        return 2
    except Stopped as stopped:
        if is_first_rank():
            mend = "; go on with --resume" if "resume" in options else ""
            print_line(f"bmtpt {options.command}: stopped by {stopped}{mend}")
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130


def program() -> NoReturn:
    """The process's entry: `main`, then an end that no thread of a library can turn into another status.

    A rank that ends while others are gone would be aborted by the threads of its process group, and the launcher would
    report that in place of our status.
    """
    try:
        status = main()
    except SystemExit as end:  # argparse's
        status = end.code if isinstance(end.code, int) else 1
    try:
        end_output()
    except UserError as mistake:  # of what argparse has printed
        print_line(f"bmtpt: {mistake}")
        status = status or 2
    if status == 0:
        sys.exit(0)
    os._exit(status)


def _demo(options: argparse.Namespace) -> None:
    # before torch and DeepSpeed are imported: the toy is made for a CPU, and more threads than one slow it down
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with quick_imports():
        from bmtpt_ds.experiments.demo import run_demo

    show(run_demo(options.out))


def _source(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    with quick_imports():
        from bmtpt_ds.commands.pipeline import run_source

    run_source(recipe, options.run_dir, options.deepspeed_config, resume=options.resume, overwrite=options.overwrite)


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


def _evaluate(options: argparse.Namespace) -> None:
    from bmtpt_ds.run_directory import read_run_recipe

    trained, values = read_run_recipe(options.prompt)
    recipe = override_recipe(values, options.set, str(options.prompt))
    with quick_imports():
        from bmtpt_ds.commands.pipeline import run_evaluate

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


def _predict(options: argparse.Namespace) -> None:
    # before the libraries are imported that print on stdout
    with answers_only() as out:
        with quick_imports():
            from bmtpt_ds.commands.predict import run_predict

        run_predict(options.prompt, options.task, options.set, options.deepspeed_config, out)


def _prepare(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    with quick_imports():
        from bmtpt_ds.commands.prepare import run_prepare

    run_prepare(recipe, options.out, overwrite=options.overwrite)


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


def _tasks(options: argparse.Namespace) -> None:
    own = load_recipe(options.config).data.tasks if options.config else {}
    from bmtpt_ds.tasks.listing import list_tasks

    show(list_tasks(options.names, own))


def command_line() -> Parser:
    """The parser of `bmtpt`, its commands in it."""
    parser = Parser(
        prog="bmtpt", description="Bayesian multi-task prompt tuning on a frozen, sharded T5.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"bmtpt_ds {__version__}", help="print the version")
    _add_demo(parser)
    _add_source(parser)
    _add_adapt(parser)
    _add_evaluate(parser)
    _add_predict(parser)
    _add_prepare(parser)
    _add_check(parser)
    _add_tasks(parser)
    return parser


def _add_demo(parser: Parser) -> None:
    command = parser.add_command(
        "demo",
        _demo,
        "see the method work: a toy T5, source stages on two ranks, three unseen tasks; four minutes on a laptop",
        "bmtpt demo",
    )
    command.add_argument(
        "--out",
        type=given_path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="the folder to write; an earlier demo goes",
    )


def _add_source(parser: Parser) -> None:
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


def _add_adapt(parser: Parser) -> None:
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


def _add_evaluate(parser: Parser) -> None:
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


def _add_predict(parser: Parser) -> None:
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


def _add_prepare(parser: Parser) -> None:
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


def _add_check(parser: Parser) -> None:
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


def _add_tasks(parser: Parser) -> None:
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
