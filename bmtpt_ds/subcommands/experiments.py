"""The commands that run or measure whole runs."""

import argparse
import os
from pathlib import Path

from bmtpt_ds.arguments import Parser, add_config, add_deepspeed, add_set, count, given, given_path, positive
from bmtpt_ds.commands.text_lines import show
from bmtpt_ds.config import load_recipe
from bmtpt_ds.imports import quick_imports


def add_demo(parser: Parser) -> None:
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


def _demo(options: argparse.Namespace) -> None:
    # before torch and DeepSpeed are imported: the toy is made for a CPU, and more threads than one slow it down
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with quick_imports():
        from bmtpt_ds.experiments.demo import run_demo

    show(run_demo(options.out))


def add_profile(parser: Parser) -> None:
    command = parser.add_command(
        "profile",
        _profile,
        "where the time of a step goes: its phases, SVGD against the backward pass, memory, FLOP/s, bytes sent",
        "bmtpt profile --random-init t5-small --set prompt.length=20 --plot profile.png",
        "bmtpt profile --config first_run --stage source --steps 50 --trace trace.json",
        "deepspeed --module bmtpt_ds profile --random-init t5-large t5-3b --set model.dtype=bfloat16 "
        "--deepspeed_config zero3 --json profile.json",
    )
    what = command.add_argument_group("what is measured")
    add_config(what, default="paper")
    add_set(what)
    add_deepspeed(what)
    what.add_argument(
        "--random-init",
        nargs="+",
        default=[],
        metavar="T5",
        help="published T5s (t5-small, t5-base, t5-large, t5-3b, t5-11b, t5-v1_1-xl, flan-t5-xxl, ...) with random "
        "weights, on rows as long as the tasks' rows are, in place of the recipe's model and rows; nothing is "
        "downloaded",
    )
    what.add_argument("--stage", choices=("both", "source", "target"), default="both", help="whose steps are made")
    what.add_argument("--steps", type=count, default=20, metavar="N", help="steps measured of each stage")
    what.add_argument("--warmup", type=count, default=3, metavar="N", help="steps made before them")
    files = command.add_argument_group("what is written")
    files.add_argument("--json", type=given_path, metavar="FILE", help="all figures; `bmtpt plan --profile` reads them")
    files.add_argument("--plot", type=given_path, metavar="FILE", help="a PNG with a bar of phases a model and stage")
    files.add_argument(
        "--trace",
        type=given_path,
        metavar="FILE",
        help="two more steps of each stage as a trace for Perfetto or chrome://tracing: FILE-source, FILE-target",
    )


def _profile(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.config, options.set)
    with quick_imports():
        from bmtpt_ds.experiments.profiling.profile import run_profile
        from bmtpt_ds.experiments.profiling.stages import Asked

    stages = ("source", "target") if options.stage == "both" else (options.stage,)
    asked = Asked(stages, options.steps, options.warmup, options.trace)
    text = run_profile(recipe, options.random_init, options.deepspeed_config, asked, options.json, options.plot)
    if text:
        show(text)


def add_plan(parser: Parser) -> None:
    command = parser.add_command(
        "plan",
        _plan,
        "what a source stage will need of a cluster: memory, layout, time of a step, for 1 to 4096 ranks",
        "bmtpt plan --model t5-3b --gpus 8 --gpu-mem 24",
        "bmtpt plan --recipe table3/t5_3b --gpus 8 --nodes 2 --link 25 --plot plan.png",
        "bmtpt plan --model t5-11b --gpus 8 --profile profile.json",
    )
    command.description += " Nothing is run and nothing downloaded; no torch is needed."
    what = command.add_argument_group("what is run")
    add_config(what, "--recipe", default="paper")
    add_set(what)
    what.add_argument(
        "--model", type=given, metavar="T5", help="a published T5's name or a model's folder (default: the recipe's)"
    )
    where = command.add_argument_group("where")
    where.add_argument("--gpus", type=count, default=8, metavar="N", help="GPUs, or CPU ranks, of a node")
    where.add_argument("--nodes", type=count, default=1, metavar="N", help="such nodes")
    figures = command.add_argument_group(
        "what the machines can do", "what is given counts before what a profile has measured, that before the defaults"
    )
    figures.add_argument(
        "--profile",
        nargs="+",
        type=given_path,
        default=[],
        metavar="FILE",
        help="JSONs of `bmtpt profile`: speed and memory of its devices, and of their links if it had several ranks",
    )
    text = "GB (10^9 bytes) of memory a rank (default: 80)"
    figures.add_argument("--gpu-mem", type=positive, metavar="GB", help=text)
    text = "TFLOP/s that a rank reaches in T5's passes, recomputation counted (default: 120)"
    figures.add_argument("--gpu-tflops", type=positive, metavar="T", help=text)
    text = "GB/s, each way, between the ranks of a node (default: 100)"
    figures.add_argument("--gpu-link", type=positive, metavar="GB/s", help=text)
    text = "GB/s, each way, between two nodes (default: 12.5, that is 100 Gbit/s)"
    figures.add_argument("--link", type=positive, metavar="GB/s", help=text)
    files = command.add_argument_group("what is written")
    files.add_argument("--json", type=given_path, metavar="FILE", help="the plan")
    files.add_argument("--plot", type=given_path, metavar="FILE", help="a PNG of a step's time against the ranks")


def _plan(options: argparse.Namespace) -> None:
    overrides = [*options.set, *([f"model.name_or_path={options.model}"] if options.model else [])]
    recipe = load_recipe(options.config, overrides)
    from bmtpt_ds.experiments.planning.cluster import Cluster, calibrated
    from bmtpt_ds.experiments.planning.plan import run_plan

    cluster = calibrated(Cluster(), options.profile).given(
        gpus=options.gpus,
        nodes=options.nodes,
        memory=options.gpu_mem,
        tflops=options.gpu_tflops,
        inside=options.gpu_link,
        between=options.link,
    )
    words = ["--config", options.config, *(word for override in overrides for word in ("--set", override))]
    show(run_plan(recipe, words, cluster, options.json, options.plot))


def add_scale(parser: Parser) -> None:
    command = parser.add_command(
        "scale",
        _scale,
        "run a grid of models, variants, seeds and target tasks; go on where it was cut; a table of what came out",
        "bmtpt scale --config scaling --out runs/scaling --dry-run",
        "bmtpt scale --config scaling --out runs/scaling --hostfile hosts",
        "bmtpt scale --config my.yaml --out runs/grid --jobs 4 --ranks 2 --set scale.seeds=[0,1]",
    )
    command.description += (
        " The grid is the recipe's section `scale`: models, seeds, variants (what each changes in the recipe), "
        "settings (what changes with a model), zero_shot; the target tasks are those of target.tasks. Every member is "
        "an ordinary run with a directory of its own, --resume included: what is finished is left alone."
    )
    what = command.add_argument_group("what is run")
    add_config(what)
    add_set(what)
    add_deepspeed(what)
    what.add_argument("--out", required=True, type=given_path, metavar="DIR", help="the folder of all runs")
    what.add_argument("--dry-run", action="store_true", help="print the commands and what is finished, run nothing")
    where = command.add_argument_group("where")
    text = "ranks of a run (default: the GPUs of this machine, shared out; one on a machine without)"
    where.add_argument("--ranks", type=count, metavar="N", help=text)
    where.add_argument("--jobs", type=count, default=1, metavar="N", help="runs side by side on this machine")
    text = "DeepSpeed's hostfile: each run takes all of its nodes"
    where.add_argument("--hostfile", type=given_path, metavar="FILE", help=text)


def _scale(options: argparse.Namespace) -> None:
    from bmtpt_ds.experiments.scaling.scale import run_scale

    show(
        run_scale(
            options.config,
            options.set,
            options.out,
            options.deepspeed_config,
            ranks=options.ranks,
            side_by_side=options.jobs,
            hostfile=options.hostfile,
            dry_run=options.dry_run,
        )
    )
