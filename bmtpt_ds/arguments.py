"""How a command line reads: help with examples, one line for a mistake, and the options that commands share."""

import argparse
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

from bmtpt_ds.errors import nearest
from bmtpt_ds.quiet import is_first_rank, let_first_rank_speak

_WIDTH = 100  # columns, at most
_MORE = "Recipe keys and defaults: bmtpt_ds/config/recipe.py. DeepSpeed JSONs: ds_configs/README.md."


class Parser(argparse.ArgumentParser):
    """Of `bmtpt` or of one of its commands.

    Help keeps examples as they are and says of every option its default or that it is required. A mistake is one line
    that names the nearest command or option. Of several ranks the first one speaks.
    """

    def __init__(self, **settings):
        # no abbreviations: a prefix that is one option's today may be two options' tomorrow
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)
        self.examples: tuple[str, ...] = ()
        self.commands: dict[str, Parser] = {}
        self._adder: argparse._SubParsersAction | None = None
        spoken = "print all that the libraries say, on all ranks"
        self.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=spoken)
        # put there by the deepspeed launcher, which sets LOCAL_RANK too
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    def add_command(
        self, name: str, run: Callable[[argparse.Namespace], None], text: str, *examples: str, more: str = _MORE
    ) -> "Parser":
        """A command of this parser.

        Args:
            run: is called with the parsed options.
            text: what the command does, in one line without a full stop.
            examples: whole command lines, at least one.
            more: what else its help says, below the examples.
        """
        if self._adder is None:
            self._adder = self.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
            self.commands = self._adder.choices
        shown = "\n".join([f"Example{'s' if len(examples) > 1 else ''}:", *(f"  {e}" for e in examples), "", more])
        command = self._adder.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=shown)
        command.set_defaults(run=run)
        command.examples = examples
        return command

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            hint = "; repeat --set before every KEY=VALUE" if "=" in rest[0] else ""
            if rest[0] == "=" or any(override.endswith("=") for override in getattr(options, "set", ())):
                hint = "; write KEY=VALUE without spaces, or put quotes around it"
            self.commands.get(options.command, self).error(f"{rest[0]!r} belongs to no option{hint}")
        return options

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        # first of all: argparse would complain that --run-dir is missing where it is misspelt
        self._refuse_unknown(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        known, is_value = self._option_string_actions, False
        for word in words:
            name, equals, _ = word.partition("=")
            if word == "--":
                return
            if is_value or not word.startswith("-") or re.match(r"-(\d|$)", word):
                if self.commands and not is_value:
                    if word not in self.commands:
                        self.error(f"unknown command {word!r}{nearest(word, self.commands) or self._there_are()}")
                    return
                is_value = False
            elif name in known:
                is_value = known[name].nargs != 0 and not equals
            else:
                shown = [n for n, action in known.items() if action.help != argparse.SUPPRESS]
                misplaced = [c for c, command in self.commands.items() if name in command._option_string_actions]
                mend = f": it goes behind the command, {self.prog} {misplaced[0]} {name}" if misplaced else ""
                self.error(f"unknown option {name}{mend or nearest(name, shown)}")

    def _there_are(self) -> str:
        return f"; there are {', '.join(self.commands)}"

    def error(self, message: str) -> NoReturn:
        if not is_first_rank():
            let_first_rank_speak()
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if is_first_rank():
            with suppress(OSError):  # Python 3.11.2 raises it here, later ones do not; the process's end tells of it
                super()._print_message(message, file)

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group is self._optionals)  # what all commands have goes last
        return super().format_help()


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, _WIDTH) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width) for line in lines)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or "default" in text:
            return text
        if action.required:
            return f"{text} (required)"
        return f"{text} (default: {'none' if action.default in (None, []) else '%(default)s'})"


def given(text: str) -> str:
    """For `type` of an option that takes a name or a path: not empty, `~` as the shell reads it, also behind `=`."""
    if not text:
        raise argparse.ArgumentTypeError("empty; is a variable of the shell not set?")
    return os.path.expanduser(text)


def given_path(text: str) -> Path:
    """As `given`, of an option that takes a file or a folder."""
    return Path(given(text))


def count(text: str) -> int:
    """For `type` of an option that takes a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def positive(text: str) -> float:
    """For `type` of an option that takes a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def add_recipe(command: Parser) -> argparse._ArgumentGroup:
    """`--config` and `--set`, in a group of their own; the group."""
    group = command.add_argument_group("recipe")
    add_config(group)
    add_set(group)
    return group


def add_config(group: argparse._ActionsContainer, *names: str, default: str | None = None) -> None:
    """`--config`, required where it has no default; `names` are others for the same."""
    text = "a YAML file or the name of a shipped recipe"
    group.add_argument(
        "--config", *names, required=default is None, default=default, type=given, metavar="RECIPE", help=text
    )


def add_set(command: argparse._ActionsContainer) -> None:
    """`--set`, to a command or a group of its options."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key, for example source.lr=0.1; may be repeated",
    )


def add_deepspeed(command: argparse._ActionsContainer) -> None:
    """`--deepspeed_config`, to a command or a group of its options."""
    command.add_argument(
        "--deepspeed_config",
        type=given,
        metavar="JSON",
        help="how the model is laid out: a file or the stem of a shipped one, such as zero3 "
        "(default: resident, the model whole on every rank)",
    )


def add_run_dir(command: Parser) -> None:
    """`--run-dir`, `--resume`, `--overwrite` and `--deepspeed_config`."""
    group = command.add_argument_group("run")
    group.add_argument(
        "--run-dir", required=True, type=given_path, metavar="DIR", help="the folder that the run is written to"
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in DIR; start if there is none")
    group.add_argument("--overwrite", action="store_true", help="remove the run in DIR first")
    add_deepspeed(group)
