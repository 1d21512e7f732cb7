"""The command that reads finished runs."""

import argparse
from pathlib import Path

from bmtpt_ds.arguments import Parser, given, given_path
from bmtpt_ds.commands.text_lines import show


def add_report(parser: Parser) -> None:
    command = parser.add_command(
        "report",
        _report,
        "tables and pictures of finished runs, the paper's figures beside them",
        "bmtpt report runs --out runs/report",
        "bmtpt report runs/table2 runs/scratch profile.json --baseline prompt_tuning bmtpt/prior=none --out report",
    )
    command.description += (
        " Writes report.md, report.tex, report.csv and PNGs, replacing files of these names. Reads config.yaml, "
        "metrics.jsonl and results.json of runs, and in a source run's folder zero_shot.json (by `bmtpt scale`, or "
        "`bmtpt evaluate --json`; its rows have 0 shots), nothing else; no torch and no GPU is needed. Runs that are "
        "not finished, or damaged, are named."
    )
    what = "run directories, folders that hold some at any depth, JSONs of `bmtpt profile`"
    command.add_argument("runs", nargs="+", type=given_path, metavar="RUN", help=what)
    command.add_argument(
        "--out", type=given_path, default=Path("runs/report"), metavar="DIR", help="the folder to write into"
    )
    command.add_argument(
        "--baseline",
        nargs="+",
        action="extend",
        default=[],
        type=given,
        metavar="METHOD",
        help="one or more METHOD, METHOD/variant or names of runs, as the table has them, that all others are compared "
        "with, task by task and seed by seed (default: prompt_tuning, else the runs from `--particles none`, and every "
        "variant of vanilla_transfer)",
    )


def _report(options: argparse.Namespace) -> None:
    from bmtpt_ds.experiments.reporting.report import run_report

    show(run_report(options.runs, options.out, options.baseline))
