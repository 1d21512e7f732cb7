"""The commands that take a prompt away and bring one in."""

import argparse

from bmtpt_ds.arguments import Parser, add_set, given, given_path
from bmtpt_ds.imports import quick_imports


def add_export(parser: Parser) -> None:
    command = parser.add_command(
        "export",
        _export,
        "write a run's prompt as a PEFT adapter with a model card, to be shared and loaded without this package",
        "bmtpt export --prompt runs/mrpc --format peft --out mrpc-prompt",
        "bmtpt export --prompt runs/glue --composed --task rte --license cc-by-4.0 --out rte-prompt",
        "bmtpt export --prompt runs/source --base-model google/flan-t5-small --out start",
    )
    command.description += (
        " A run of `adapt` becomes MULTITASK_PROMPT_TUNING of rank 1, which PEFT composes as this package does, its "
        "tasks numbered in their order. A run of `source` becomes PROMPT_TUNING, its particles' mean."
    )
    what = command.add_argument_group("what is exported")
    what.add_argument(
        "--prompt", required=True, type=given_path, metavar="DIR", help="a finished run of `adapt` or of `source`"
    )
    what.add_argument(
        "--task", nargs="+", default=[], metavar="T", help="tasks, in the order of their numbers (default: the run's)"
    )
    what.add_argument(
        "--composed",
        action="store_true",
        help="a PROMPT_TUNING adapter a task, which needs no task numbers; of several tasks in subfolders of DIR",
    )
    files = command.add_argument_group("what is written")
    files.add_argument("--format", choices=("peft",), default="peft", help="adapter_config.json and safetensors")
    files.add_argument("--out", required=True, type=given_path, metavar="DIR", help="the folder to write, new or empty")
    files.add_argument("--overwrite", action="store_true", help="replace what `export` has written in DIR")
    files.add_argument(
        "--base-model",
        type=given,
        metavar="NAME",
        help="what the adapter names as its base model, such as owner/name on the hub (default: the run's model)",
    )
    files.add_argument(
        "--license",
        type=given,
        default="unknown",
        metavar="ID",
        help="the model card's licence in the hub's letters, such as apache-2.0",
    )


def _export(options: argparse.Namespace) -> None:
    with quick_imports():
        from bmtpt_ds.export.to_peft import run_export

    run_export(
        options.prompt,
        options.out,
        options.task,
        options.base_model,
        options.license,
        composed=options.composed,
        overwrite=options.overwrite,
    )


def add_import(parser: Parser) -> None:
    command = parser.add_command(
        "import",
        _import,
        "make a run's folder of PEFT prompts, whoever trained them: particles, a start, a prompt to evaluate",
        "bmtpt import --peft mrpc-prompt --out runs/imported",
        "bmtpt import --peft seed0 seed1 seed2 --out runs/posterior --set model.name_or_path=google-t5/t5-base",
        "bmtpt import --peft theirs --task mrpc --out runs/theirs",
    )
    command.description += (
        " `adapt --particles DIR` takes every prompt as a particle. Where the tasks are known (--task, or an adapter "
        "of `bmtpt export`), `evaluate` and `predict` take DIR as a run of `adapt`. The model's weights are read, to "
        "know whom the prompts belong to."
    )
    what = command.add_argument_group("what is imported")
    what.add_argument(
        "--peft",
        required=True,
        nargs="+",
        type=given_path,
        metavar="DIR",
        help="folders of PROMPT_TUNING adapters, or of MULTITASK_PROMPT_TUNING with rank 1, all of one T5",
    )
    what.add_argument(
        "--task",
        nargs="+",
        default=[],
        metavar="T",
        help="the tasks of the prompts of one adapter, by their number (default: as `export` wrote them, else none)",
    )
    add_set(what)
    files = command.add_argument_group("what is written")
    files.add_argument("--out", required=True, type=given_path, metavar="DIR", help="the folder to write, new or empty")
    files.add_argument("--overwrite", action="store_true", help="replace what `import` has written in DIR")


def _import(options: argparse.Namespace) -> None:
    with quick_imports():
        from bmtpt_ds.export.from_peft import run_import

    run_import(options.peft, options.out, options.task, options.set, overwrite=options.overwrite)
