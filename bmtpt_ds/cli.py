"""The command line: parses, calls one function, prints."""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bmtpt_ds import __version__
from bmtpt_ds.arguments import Parser
from bmtpt_ds.commands.text_lines import end_output
from bmtpt_ds.errors import RankError, UserError, unreachable
from bmtpt_ds.quiet import is_first_rank, let_first_rank_speak, print_line, quieten
from bmtpt_ds.stopping import Stopped
from bmtpt_ds.subcommands import experiments, inputs, reports, sharing, stages

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
        return _refuse(options.command, str(mistake), whoever=isinstance(mistake, RankError))
    except OSError as error:  # looking whether there is something may raise it, anywhere
        said = unreachable(error)
        if said is None:
            raise
        if is_first_rank():
            return _refuse(options.command, said)
        let_first_rank_speak()
        raise  # still there: it has happened to this rank alone
    except Stopped as stopped:
        if is_first_rank():
            mend = "; go on with --resume" if "resume" in options else ""
            print_line(f"bmtpt {options.command}: stopped by {stopped}{mend}")
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130


def _refuse(command: str, mistake: str, *, whoever: bool = False) -> int:
    """`whoever`: whether every rank that it happens to says so."""
    if is_first_rank() or whoever:
        # names of files, and what libraries say, may hold line breaks
        print_line(f"bmtpt {command}: {' '.join(mistake.splitlines())}")
    else:
        let_first_rank_speak()
    return 2


def program() -> NoReturn:
    """The process's entry: `main`, then an end that no thread of a library can turn into another status.

    A thread of the process group that wants something of Python while that is taken down aborts the process, and the
    launcher would report that in place of our status. So Python is not taken down.
    """
    try:
        status = main()
    except SystemExit as end:  # argparse's
        status = end.code if isinstance(end.code, int) else 1
    if status == 0:
        _end_libraries()
    try:
        end_output()
    except UserError as mistake:  # of what argparse has printed
        print_line(f"bmtpt: {mistake}")
        status = status or 2
    os._exit(status)


def _end_libraries() -> None:
    """What they have to do at a good end of the process, but for taking down Python."""
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")  # where mpirun started us
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # it takes a rank that goes without for one that has crashed, and ends the others


def command_line() -> Parser:
    """The parser of `bmtpt`, its commands in it."""
    parser = Parser(
        prog="bmtpt", description="Bayesian multi-task prompt tuning on a frozen, sharded T5.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"bmtpt_ds {__version__}", help="print the version")
    for add in (
        experiments.add_demo,
        stages.add_source,
        stages.add_adapt,
        stages.add_evaluate,
        stages.add_predict,
        sharing.add_export,
        sharing.add_import,
        inputs.add_prepare,
        inputs.add_check,
        inputs.add_tasks,
        experiments.add_scale,
        experiments.add_profile,
        experiments.add_plan,
        reports.add_report,
    ):
        add(parser)
    return parser
