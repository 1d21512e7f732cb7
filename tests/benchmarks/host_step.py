"""What a step of the source stage costs the host that feeds a GPU, without the GPU.

A small T5 goes through its passes with so many blocks, few numbers a token and, while time is taken, few tokens: what
is left is what the host does for each operation, whatever its size. Blocks run whole, as in bfloat16 on a GPU;
attention's kernels are compiled and end at a stand-in for CUDA's driver, a norm is one operation, as it is there. So
times are without the driver's own part of a launch, and only good for comparing one version with another, in turn and
on one machine.

`launches`: operations of the step, of rows as long as the tasks', that would put something on the GPU. `others`:
views, and memory.

    python -m tests.benchmarks.host_step [--steps 40] [--out FILE]     ends with one JSON line
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration
from triton.runtime import driver

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, Prompts
from bmtpt_ds.model import frozen, norm, whole_block
from bmtpt_ds.parallel import Ranks, load_backbone
from bmtpt_ds.phases import Phases
from bmtpt_ds.stopping import StopSignal
from tests.benchmarks.json_line import write_line
from tests.benchmarks.source_step import draw_rows
from tests.model import launched_attention

M, L, H = 5, 100, 16
FEW = 3  # tokens of a prompt, a text and a target
VOCABULARY = 512
BLOCKS = {"t5-base": (12, "relu"), "t5-v1_1-base": (12, "gated-gelu"), "t5-3b": (24, "relu")}  # of each stack
_VIEWS = frozenset(
    "view t transpose expand _unsafe_view unsqueeze squeeze slice select split split_with_sizes detach alias unbind "
    "permute as_strided _reshape_alias unfold chunk lift_fresh promote_types _record_function_enter_new "
    "_record_function_exit empty empty_like new_empty empty_strided new_empty_strided".split()
)


class Counting(TorchDispatchMode):
    """Counts operations; on a CPU the backward pass runs in the same thread."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[bool] = Counter()  # by whether they launch something

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.found[operation.overloadpacket.__name__ not in _VIEWS] += 1
        return operation(*arguments, **(named or {}))


def stand_in() -> None:
    """Blocks run whole on this CPU, but for what a GPU's kernels would compute."""
    driver.set_active(launched_attention.Driver())
    frozen.WHOLE = frozenset({("cpu", torch.float32)})
    frozen.why_no_kernels = lambda device: None
    for module in (norm, whole_block):
        module.normed = lambda x, weight, epsilon: (torch.relu(x), x.new_empty(len(x), 1))
        module.norm_gradient = lambda gradient, x, weight, scale: torch.relu(gradient)


def rows_of(seed: int, most: int = 512) -> list[TokenRow]:
    """As long as the tasks' rows are, or `most` tokens."""
    parts = [(row.source[-most:], row.target[-most:]) for row in draw_rows(seed)]
    return [TokenRow(*([token % VOCABULARY for token in ids] for ids in part)) for part in parts]


def measure(blocks: int, feed_forward: str, steps: int) -> dict:
    ranks = Ranks(timeout=60)
    sizes = {"d_model": H, "d_ff": H, "d_kv": H, "num_heads": 1, "num_layers": blocks, "vocab_size": VOCABULARY}
    config = T5Config(**sizes, feed_forward_proj=feed_forward, dropout_rate=0.0, decoder_start_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        T5ForConditionalGeneration(config).save_pretrained(folder)
        model = load_backbone(ranks, ModelConfig(name_or_path=folder), deepspeed_json.load("resident"))
    gradient_of = GradientPass(model, 0, 10**6, 0, Phases(ranks.device))
    stop, seen = StopSignal(), launched_attention.seen

    def passes(length: int, rows: list[TokenRow]) -> Callable[[], object]:
        prompts, work = Prompts(torch.randn(M, length, H)), gradient_of.prepare(StepRows.evenly(rows), M, length)
        gradient_of(prompts, work, 1, stop)  # compiles what is to be compiled
        seen.clear()
        return lambda: gradient_of(prompts, work, 1, stop)

    counted, timed = passes(L, rows_of(0)), passes(FEW, rows_of(0, FEW))
    with Counting() as counting:
        counted()
    kernels, times = len(seen), []
    for _ in range(steps):
        begun = time.perf_counter()
        timed()
        times.append(time.perf_counter() - begun)
        seen.clear()
    return {
        "launches": counting.found[True] + kernels,
        "others": counting.found[False],
        "ms": round(1000 * statistics.median(times), 1),
        "least_ms": round(1000 * min(times), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    stand_in()
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "triton")}
    found = {"date": str(date.today()), "versions": versions, "threads": torch.get_num_threads()}
    found["models"] = {name: measure(*of_model, options.steps) for name, of_model in BLOCKS.items()}
    for name, figures in found["models"].items():
        print(f"{name:14}", *(f"{key} {value}" for key, value in figures.items()), sep="  ")
    write_line(found, options.out)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
