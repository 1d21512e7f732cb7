"""What torch.compile makes of a step of the source stage on one resident rank, and what compiling costs.

A step packs rows of any lengths without padding, so nearly every step has other shapes, and a T5 block's attention
looks at the buckets one by one: how many there are, and which have padding, is the *structure* of the step, and a
compiled block serves one structure. Compared in one process, in turn, with the same weights and rows:

- `eager`: what a run does.
- `tokenwise`: compiled is what sees tokens alone, feed-forward layers and norms; any number of tokens (dynamic=True).
- `blocks`: each T5 block compiled whole (dynamic=True). It gets rows of one structure alone, the most frequent one.
- `static`: each T5 block compiled for one shape (dynamic=False), on rows that are all equally long and the same in
  every step: the most that a bounded set of shapes could give. Its ratio is over `equal`, eager on these rows.

Equal blocks share their graphs; sizes that happen to be equal are not taken to be equal always (use_duck_shape).
`of CPU` is the same ratio in the process's CPU time: with one thread (OMP_NUM_THREADS=1) what else runs on the machine
hardly touches it. `first` is the first step's time, compiling included, from an empty cache; `compiling` all of it, the
later steps' too; `graphs` the frames that were compiled, `late` those of them after the warm-up. `error` is the
gradient's relative difference from that of eager in float64, on the first rows. `shapes` tells of 1000 draws how many
structures there are, how many shapes with lengths rounded up to 64 (targets to 8), and the tokens that the rounding
makes over those that must be computed.

    python -m tests.benchmarks.compiled_step [--model t5-small] [--repeats 5] [--out FILE]   ends with one JSON line
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
import torch.fx.experimental._config as shape_config
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._inductor.utils import fresh_cache

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.plan import Cell, buckets, padded_tokens
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.runlog import Phases
from tests.benchmarks.json_line import write_line
from tests.benchmarks.source_step import SHAPES, L, draw_rows, equally_long, make_model, our_step, seconds
from tests.one_step import gradient_of_rows

WARM = 3  # steps of each variant before the measured ones
DRAWS = 1000
ROUNDED = 64  # tokens
ON_EQUAL_ROWS = ("equal", "static")
OVER = {"tokenwise": "eager", "blocks": "eager", "static": "equal"}


def blocks(model: Sharded) -> Iterator[nn.Module]:
    for stack in (model.backbone.encoder, model.backbone.decoder):
        yield from stack.block


def compile_tokenwise(model: Sharded) -> None:
    for block in blocks(model):
        *attentions, feed_forward = block.layer
        for layer in attentions:
            layer.layer_norm.compile(dynamic=True)
        feed_forward.compile(dynamic=True)


def compile_blocks(model: Sharded, *, dynamic: bool) -> None:
    for block in blocks(model):
        block.compile(dynamic=dynamic)


def cells_of(rows: Sequence[TokenRow], M: int, source: int = 1, target: int = 1) -> list[Cell]:
    """A step's cells, their lengths rounded up to multiples of `source` and `target`."""
    return [
        Cell(p, i, 1, -(-(L + len(row.source)) // source) * source, -(-len(row.target) // target) * target)
        for i, row in enumerate(rows)
        for p in range(M)
    ]


def structure(rows: Sequence[TokenRow], M: int) -> tuple[bool, ...]:
    """Of each bucket of a step, whether it is padded."""
    return tuple(len({cell.source_tokens for cell in bucket}) > 1 for bucket in buckets(cells_of(rows, M)))


def shapes(M: int) -> dict[str, float]:
    """Of many draws of rows: how often something would have to be compiled anew."""
    structures, totals, rounded, tokens = Counter(), set(), set(), []
    for rows in map(draw_rows, range(DRAWS)):
        structures[structure(rows, M)] += 1
        cells, coarse = cells_of(rows, M), cells_of(rows, M, ROUNDED, 8)
        totals.add(padded_tokens(cells))
        rounded.add(tuple((len(b), max(c.source_tokens for c in b)) for b in buckets(coarse)))
        tokens.append(padded_tokens(coarse) / sum(cell.tokens for cell in cells))
    return {
        "steps": DRAWS,
        "structures": len(structures),
        "of_most_frequent": structures.most_common(1)[0][1],
        "totals": len(totals),
        "rounded": len(rounded),
        "rounded_tokens": statistics.fmean(tokens),
    }


def alike(number: int, M: int) -> list[list[TokenRow]]:
    """Rows of so many steps that all have the most frequent structure."""
    most, _ = Counter(structure(draw_rows(seed), M) for seed in range(100)).most_common(1)[0]
    found = (rows for rows in map(draw_rows, count()) if structure(rows, M) == most)
    return [next(found) for _ in range(number)]


class Compiling:
    """What was compiled for each variant."""

    def __init__(self):
        self.graphs: Counter[str] = Counter()
        self.late: Counter[str] = Counter()  # after the warm-up
        self.seconds: Counter[str] = Counter()
        self.reasons: dict[str, list[str]] = {}

    @contextmanager
    def of(self, name: str, *, late: bool = False) -> Iterator[None]:
        before = len(get_compilation_metrics())
        yield
        for metrics in get_compilation_metrics()[before:]:
            self.graphs[name] += 1
            self.late[name] += late
            self.seconds[name] += metrics.entire_frame_compile_time_s or 0.0
            if metrics.recompile_reason or metrics.fail_reason:
                reason = str(metrics.fail_reason or metrics.recompile_reason)
                self.reasons.setdefault(name, []).append(reason.splitlines()[0][:160])


def gradient_of(model: Sharded, prompts: torch.Tensor, rows: Sequence[TokenRow]) -> torch.Tensor:
    gradient_pass = GradientPass(model, 0, model.token_budget("auto", L + 512), 0, Phases(prompts.device))
    return gradient_of_rows(gradient_pass, prompts, rows).gradient


def load(folder: str, shape: str, ranks: Ranks) -> tuple[dict[str, Sharded], torch.Tensor]:
    """The same backbone for each variant, compiled as it says, and the embedding."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    make_model(shape, Path(folder), dtype, ranks.device)
    config = ModelConfig(name_or_path=folder, dtype=str(dtype).removeprefix("torch."))
    ds = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": dtype == torch.bfloat16}}
    ds = deepspeed_json.load("resident") if ranks.device.type == "cpu" else ds
    models = {name: load_backbone(ranks, config, ds) for name in ("eager", "tokenwise", "blocks", "static")}
    compile_tokenwise(models["tokenwise"])
    compile_blocks(models["blocks"], dynamic=True)
    compile_blocks(models["static"], dynamic=False)
    return models, models["eager"].backbone.shared.weight.detach()


def errors(models: dict[str, Sharded], prompts: torch.Tensor, rows: list[TokenRow]) -> dict[str, float]:
    """Relative differences from the gradient of eager in float64, all on compiled graphs that are there already."""
    eager, dtype = models["eager"].backbone, models["eager"].backbone.shared.weight.dtype
    equal = equally_long(rows)
    eager.double()
    exact = {name: gradient_of(models["eager"], prompts, equal if name == "static" else rows) for name in models}
    eager.to(dtype)
    found = {}
    for name, model in models.items():
        gradient = gradient_of(model, prompts, equal if name == "static" else rows)
        found[name] = ((gradient - exact[name]).norm() / exact[name].norm()).item()
    return found


def take_turns(
    steps: dict[str, Callable], all_rows: Sequence[Sequence[TokenRow]], compiling: Compiling, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Each variant's seconds for each step, the warm-up's too: by the clock, and of this process on its cores."""
    equal = equally_long(all_rows[0])
    times: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for i, rows in enumerate(all_rows):
        for name, step in steps.items():
            begun = time.process_time()
            with compiling.of(name, late=i >= WARM):
                times[name].append(seconds(step, equal if name in ON_EQUAL_ROWS else rows, device))
            busy[name].append(time.process_time() - begun)
            spent = f"{times[name][-1]:.2f} s, {busy[name][-1]:.2f} s of CPU"
            print(f"step {i} {name}: {spent}, {compiling.graphs[name]} graphs", flush=True)
    return times, busy


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians after the warm-up, and medians of the steps' ratios."""
    settled = {name: spent[WARM:] for name, spent in times.items()}
    ratios = {name: [x / y for x, y in zip(settled[name], settled[base], strict=True)] for name, base in OVER.items()}
    return {
        "seconds": {name: statistics.median(spent) for name, spent in settled.items()},
        "over_eager": {name: statistics.median(found) for name, found in ratios.items()},
        "ratios": ratios,
    }


def measure(shape: str, M: int, repeats: int) -> dict:
    torch._dynamo.config.recompile_limit = 64
    shape_config.use_duck_shape = False
    ranks, compiling = Ranks(timeout=600), Compiling()
    steps: dict[str, Callable] = {}
    with tempfile.TemporaryDirectory() as folder, fresh_cache():
        models, embedding = load(folder, shape, ranks)
        prompts = embedding[:: 32128 // (M * L)][: M * L].float().view(M, L, -1).clone()
        for name in ("eager", "tokenwise", "blocks", "equal", "static"):
            steps[name] = our_step(models["eager" if name == "equal" else name], prompts)
        rows = alike(WARM + repeats, M)
        times, busy = take_turns(steps, rows, compiling, ranks.device)
        found = errors(models, prompts, rows[0])
    cpu = f"cpu, {torch.get_num_threads()} threads"
    return {
        "model": shape,
        "M": M,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else cpu,
        **summary(times),
        "of_cpu": summary(busy),
        "first": {name: spent[0] for name, spent in times.items()},
        "compiling": dict(compiling.seconds),
        "graphs": dict(compiling.graphs),
        "late": dict(compiling.late),
        "reasons": compiling.reasons,
        "graph_breaks": sum(counters["graph_break"].values()),
        "errors": found,
        "times": times,
        "shapes": shapes(M),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="t5-small")
    parser.add_argument("--particles", type=int, default=5, metavar="M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    found = measure(options.model, options.particles, options.repeats)
    found = {"date": str(date.today()), "versions": versions} | found
    print(
        f"{'':10}{'s a step':>10}{'over eager':>12}{'of CPU':>8}{'first, s':>10}{'graphs':>8}{'late':>6}{'error':>10}"
    )
    for name, spent in found["seconds"].items():
        ratio, error = found["over_eager"].get(name, 1.0), found["errors"].get(name, found["errors"]["eager"])
        busy = found["of_cpu"]["over_eager"].get(name, 1.0)
        compiled = f"{found['graphs'].get(name, 0):8}{found['late'].get(name, 0):6}"
        print(f"{name:10}{spent:10.3f}{ratio:12.3f}{busy:8.3f}{found['first'][name]:10.1f}{compiled}{error:10.1e}")
    write_line(found, options.out)


if __name__ == "__main__":
    main()
