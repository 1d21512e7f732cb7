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
from pathlib import Path

import deepspeed
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from bmtpt_ds.cli import main


def run(arguments: list[str], calls: collections.Counter) -> dict:
    calls.clear()
    *arguments, stdin = arguments if arguments[-2:-1] == ["<"] else [*arguments, os.devnull]
    printed, said, begin = io.TextIOWrapper(io.BytesIO()), io.StringIO(), time.perf_counter()
    with open(stdin) as sys.stdin, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        status = main([argument for argument in arguments if argument != "<"])
    printed.flush()
    stdout = printed.buffer.getvalue().decode()
    sys.stdout.write(stdout)
    sys.stderr.write(said.getvalue())
    seconds = round(time.perf_counter() - begin, 1)
    return {"status": status, "stdout": stdout, "stderr": said.getvalue(), "calls": dict(calls), "seconds": seconds}


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


if __name__ == "__main__":
    *_, plan, outcome = sys.argv  # the launcher puts --local_rank first
    torch.set_num_threads(1)
    calls = count_calls()
    seen = [run(command, calls) for command in json.loads(Path(plan).read_text())]
    if os.environ.get("RANK", "0") == "0":
        Path(outcome).write_text(json.dumps(seen))
