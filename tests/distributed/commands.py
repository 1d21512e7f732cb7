"""Runs several commands of bmtpt in one job and writes what was seen of each; started by `tests/launch.py`.

Arguments: a JSON file with a list of argument lists (with `<`, FILE at the end for what reads stdin), and the file to
write (by rank 0).
"""

import collections
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from bmtpt_ds import losses, source
from bmtpt_ds.cli import main


def run(arguments: list[str], calls: collections.Counter, sent: collections.Counter) -> dict:
    calls.clear()
    sent.clear()
    *arguments, stdin = arguments if arguments[-2:-1] == ["<"] else [*arguments, os.devnull]
    printed, said, begin = io.TextIOWrapper(io.BytesIO()), io.StringIO(), time.perf_counter()
    with open(stdin) as sys.stdin, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        status = main([argument for argument in arguments if argument != "<"])
    printed.flush()
    stdout = printed.buffer.getvalue().decode()
    sys.stdout.write(stdout)
    sys.stderr.write(said.getvalue())
    seconds = round(time.perf_counter() - begin, 1)
    counted = {"calls": dict(calls), "sent": dict(sent)}
    return {"status": status, "stdout": stdout, "stderr": said.getvalue(), "seconds": seconds} | counted


def count_calls() -> collections.Counter:
    """Forward passes, by module class or function, and by the dtype of a block's input."""
    calls = collections.Counter()

    def before_forward(module, inputs) -> None:
        calls[type(module).__name__] += 1
        if type(module).__name__ == "T5Block":
            calls[f"T5Block {inputs[0].dtype}"] += 1

    register_module_forward_pre_hook(before_forward)
    checkpoint = deepspeed.checkpointing.checkpoint

    def counted(*inputs):
        calls["deepspeed.checkpointing.checkpoint"] += 1
        return checkpoint(*inputs)

    deepspeed.checkpointing.checkpoint = counted
    return calls


def count_bytes() -> collections.Counter:
    """Bytes of the tensors that this rank puts into collectives in the steps of a source stage, by kind.

    Those with which ZeRO-3 gathers the backbone are of another kind; the integers are its own: it compares, once,
    what the ranks are going to gather.
    """
    sent = collections.Counter()
    inside = []  # a step; a collective in it, which may be made of others

    def counted(kind: str, collective: Callable, which: int) -> Callable:
        def call(*arguments, **options):
            if inside == ["step"] and arguments[which].is_floating_point():
                sent[kind] += arguments[which].nbytes
            inside.append(kind)
            try:
                return collective(*arguments, **options)
            finally:
                inside.pop()

        return call

    def in_a_step(part: Callable) -> Callable:
        def call(*arguments, **options):
            inside.append("step")
            try:
                return part(*arguments, **options)
            finally:
                inside.pop()

        return call

    for module in (torch.distributed, deepspeed.comm):
        for kind, which in (("all_reduce", 0), ("all_gather", 1), ("broadcast", 0)):
            setattr(module, kind, counted(kind, getattr(module, kind), which))
    losses.GradientPass.__call__ = in_a_step(losses.GradientPass.__call__)
    source.svgd_step = in_a_step(source.svgd_step)
    return sent


if __name__ == "__main__":
    *_, plan, outcome = sys.argv  # the launcher puts --local_rank first
    torch.set_num_threads(1)
    calls, sent = count_calls(), count_bytes()
    seen = [run(command, calls, sent) for command in json.loads(Path(plan).read_text())]
    if os.environ.get("RANK", "0") == "0":
        Path(outcome).write_text(json.dumps(seen))
