"""Time of a step of the source stage under ZeRO-3's settings, over the same step with a resident backbone.

Two ranks on one machine hold all variants at once, with the same random weights, and take turns: one step of each, same
rows, same prompts. Gradients are compared with the resident ones. A step is one micro-batch's forward and backward pass
and the all-reduce of the gradients, so what a variant takes more is what gathering its weights costs.

`DeepSpeed's hooks` is ZeRO-3 as DeepSpeed does it by itself: T5's blocks are its leaf modules, the next one is gathered
ahead, and linear layers are its own, which it puts in place of torch's for the whole process, here for its own steps.
`deep` has as many blocks as T5-3B, but tiny ones: there the host's work for each is about all that a step takes.

On CPUs a gather is not hidden behind the computation, as on GPUs, where it runs on a stream of its own: what is seen
here is its start, its copies and its transfer.

    deepspeed --num_gpus 2 --module tests.benchmarks.zero3_step [--repeats 7] [--out FILE]     ends with one JSON line
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.model.backbone import Backbone, build_backbone, checkpoint_activations, read_config
from bmtpt_ds.model.weights import CheckpointReader
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.parallel.stored import Stored, fill
from bmtpt_ds.phases import Phases
from tests import toy
from tests.one_step import gradient_of_rows

SIZES = {
    "t5-small": {"vocab_size": 32128, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64},
    "deep": {"vocab_size": 100, "d_model": 16, "d_ff": 32, "num_layers": 24, "num_heads": 2, "d_kv": 8},
}
M, L, SOURCES, TARGET = 2, 100, (20, 40), 2  # prompts, their tokens; tokens of each row and of its target
HOOKS = "DeepSpeed's hooks"
TORCHS_LINEAR = functional.linear
LEAVES = {"leaf_module": {"classes": ["T5Block"]}}


def variants() -> dict[str, dict]:
    """`zero_optimization` of each."""
    zero3, hpz = (deepspeed_json.load(name)["zero_optimization"] for name in ("zero3", "zero3_hpz"))
    return {
        "resident": {"stage": 0},
        "nothing ahead": zero3 | {"stage3_prefetch_bucket_size": 0},
        "zero3": zero3,
        "zero3_hpz": hpz | {"zero_hpz_partition_size": dist.get_world_size()},
        "all live": zero3 | {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9},
    }


class Gathers:
    """Counts what DeepSpeed asks of the group while weights are gathered."""

    def __init__(self):
        self.calls = 0
        for name in ("allgather_fn", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_reduce"):
            setattr(dist, name, self._counted(getattr(dist, name)))
        self._depth = 0

    def _counted(self, function: Callable) -> Callable:
        def counted(*inputs, **named):
            self.calls += self._depth == 0  # one of them calls another
            self._depth += 1
            try:
                return function(*inputs, **named)
            finally:
                self._depth -= 1

        return counted


def load(ranks: Ranks, folder: Path, zero: dict) -> Sharded:
    model = ModelConfig(name_or_path=str(folder))
    ds = {"zero_optimization": zero}
    deepspeed_json.check(ds, dtype=model.dtype, source="benchmark")
    return load_backbone(ranks, model, ds)


def by_hooks(ranks: Ranks, folder: Path, like: Sharded) -> Sharded:
    """The same model with nothing of ours around its blocks."""
    ds = like.ds | {"zero_optimization": like.ds["zero_optimization"] | LEAVES}
    sharding = deepspeed.zero.Init(config_dict_or_path=ds)
    backbone = build_backbone(read_config(folder, 0.0), dtype=torch.float32, own_head=False, building=sharding)
    tensors = [Stored(name, parameter.ds_shape, parameter) for name, parameter in backbone.named_parameters()]
    fill(ranks, tensors, CheckpointReader(folder), torch.float32)
    engine, *_ = deepspeed.initialize(model=backbone, config=ds)
    return replace(like, backbone=engine.module, ds=ds)


def measure(passes: dict[str, GradientPass], backbones: dict[str, Backbone], counter: Gathers, repeats: int) -> dict:
    """Median seconds of a step, ratios over resident (both of steps in turn), gathers a step; by variant."""
    width = backbones["resident"].config.d_model
    prompts = torch.randn(M, L, width, generator=torch.Generator().manual_seed(0))
    rows = [TokenRow([7 + i] * source, [9] * TARGET) for i, source in enumerate(SOURCES)]
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    gathers, gradients = {}, {}
    for repeat in range(-3, repeats):  # in three steps DeepSpeed learns the order of the modules, a changed one too
        for name, gradient_pass in passes.items():
            backbones[name].train(backbones[name].train_while_tuning)
            functional.linear = zero3_linear_wrap if name == HOOKS else TORCHS_LINEAR
            dist.barrier()
            before, begun = counter.calls, time.perf_counter()
            gradient = gradient_of_rows(gradient_pass, prompts, rows).gradient
            dist.barrier()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - begun)
            gathers[name] = counter.calls - before - (dist.get_world_size() > 1)  # the step's own all-reduce
            gradients[name] = gradient
            difference = ((gradient - gradients["resident"]).norm() / gradient.norm()).item()
            assert difference < 1e-4, f"{name}: {difference} from the resident gradient"
    over = {
        name: statistics.median(x / y for x, y in zip(found, seconds["resident"], strict=True))
        for name, found in seconds.items()
    }
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {"seconds": medians, "over_resident": over, "gathers": gathers}


def table(found: dict) -> str:
    lines = [f"{'':32}{'s a step':>10}{'over resident':>15}{'gathers':>9}"]
    for name, seconds in found["seconds"].items():
        lines.append(f"{name:32}{seconds:10.3f}{found['over_resident'][name]:15.2f}{found['gathers'][name]:9}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="t5-small")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    ranks, sizes, counter = Ranks(timeout=300), SIZES[options.model], Gathers()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(ranks.from_first(scratch)) / "model"
        ranks.first_does(lambda: toy.write_model(folder, own_head=False, **sizes))
        models = {name: load(ranks, folder, zero) for name, zero in variants().items()}
        models[HOOKS] = by_hooks(ranks, folder, models["zero3"])
    backbones = {name: model.backbone for name, model in models.items()}
    passes = {name: GradientPass(model, 0, 10**9, 0, Phases(ranks.device)) for name, model in models.items()}
    found = {}
    for what in ("kept", "recomputed"):
        if what == "recomputed":
            for backbone in backbones.values():
                checkpoint_activations(backbone)
        found[what] = measure(passes, backbones, counter, options.repeats)
        if ranks.first:
            print(f"activations {what}\n{table(found[what])}", flush=True)
    if not ranks.first:
        return
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    line = {"date": str(date.today()), "versions": versions, "model": options.model, "ranks": ranks.world, **found}
    if options.out:
        options.out.write_text(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
