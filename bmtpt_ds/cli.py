"""The command line: parses, calls one function, prints."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bmtpt_ds import __version__
from bmtpt_ds.config import load_recipe, override_recipe
from bmtpt_ds.errors import UserError
from bmtpt_ds.stopping import Stopped

# Seconds: a launcher ends all ranks once one of them has failed, and only the first one says why.
_LET_FIRST_SPEAK = 5.0

_EPILOG = "Recipe keys and defaults: bmtpt_ds/config.py. DeepSpeed JSONs: ds_configs/README.md."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0, 2 for a user's mistake (one line on stderr), 128 + signal when stopped."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except UserError as mistake:
        if _is_first_rank():
            # names of files, and what libraries say, may hold line breaks
            print(f"bmtpt {options.command}: {' '.join(str(mistake).splitlines())}", file=sys.stderr)
        else:
            time.sleep(_LET_FIRST_SPEAK)
        return 2
    except Stopped as stopped:
        if _is_first_rank():
            print(f"bmtpt {options.command}: stopped by {stopped}; go on with --resume", file=sys.stderr)
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
    if status == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_first_rank() -> bool:
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((os.environ[n] for n in names if n in os.environ), "0") == "0"


def _source(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    from bmtpt_ds.pipeline import run_source

    run_source(recipe, options.run_dir, options.deepspeed_config, resume=options.resume, overwrite=options.overwrite)


def _adapt(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    from bmtpt_ds.pipeline import run_adapt

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
    from bmtpt_ds.pipeline import run_evaluate

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
        print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bmtpt", description="Bayesian multi-task prompt tuning on a frozen, sharded T5.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"bmtpt_ds {__version__}")
    # put there by the deepspeed launcher, which sets LOCAL_RANK too
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    source = _command(commands, "source", _source, "learn the posterior of the source tasks: M particles, SVGD")
    _add_recipe(source)
    _add_run_dir(source)

    adapt = _command(commands, "adapt", _adapt, "adapt the particles' mean to a target task, validate, test once")
    _add_recipe(adapt)
    adapt.add_argument(
        "--particles", required=True, metavar="DIR|FILE|none", help="a run of `source`; none: from vocabulary rows"
    )
    _add_run_dir(adapt)

    evaluate = _command(commands, "evaluate", _evaluate, "score a run's prompt on a split")
    evaluate.add_argument(
        "--prompt", required=True, type=Path, metavar="DIR", help="a run of `adapt`, or of `source` (zero shots)"
    )
    evaluate.add_argument("--task", nargs="+", default=[], help="tasks to score (default: those of the run)")
    evaluate.add_argument("--split", choices=("validation", "test"), default="test", help="default: %(default)s")
    _add_set(evaluate)
    _add_deepspeed(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the scores (0 to 100) as JSON")
    evaluate.add_argument("--predictions", type=Path, metavar="FILE", help="write a JSON line for every row")
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG)
    command.set_defaults(run=run)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return command


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", required=True, metavar="RECIPE", help="a YAML file or the name of a shipped recipe"
    )
    _add_set(command)


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key, for example source.lr=0.1; may be repeated",
    )


def _add_deepspeed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--deepspeed_config",
        metavar="JSON",
        help="a file or the stem of a shipped one, such as zero3 (default: resident, the model whole on every rank)",
    )


def _add_run_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-dir", required=True, type=Path, metavar="DIR", help="where the run is written")
    _add_deepspeed(command)
    command.add_argument("--resume", action="store_true", help="go on with the run in DIR; start if there is none")
    command.add_argument("--overwrite", action="store_true", help="remove the run in DIR first")
