"""Memory of a frozen backbone: two ranks of ZeRO-3 against two ranks that hold it whole.

Random weights of about 200 million float32 parameters go through the loading and the steps of a real run. Counted:

- held: bytes of parameters that lie on a rank between two steps, from its tensors (shards and whole ones);
- peak: the same at the fullest moment of a step, looked at when a module begins and ends its forward or backward pass;
- RSS: the process's resident memory before loading, its peak while loading, and its peak after the steps.

The transient of a step under ZeRO-3 is what stage3_max_live_parameters lets live, plus the largest tensor.

    python -m tests.benchmarks.zero3_memory [--out FILE]       some three minutes on two cores; ends with one JSON line
"""

import argparse
import json
import resource
import tempfile
from datetime import date
from pathlib import Path

RANKS = 2
STEPS = 3
MB = 1e6


def make_checkpoint(folder: Path) -> int:
    """A random T5 v1.1 of base width on disk (float16, as published ones are); the number of its parameters."""
    import torch

    from tests import toy

    sizes = {"vocab_size": 32128, "d_model": 768, "d_ff": 2048, "num_layers": 9, "num_heads": 12}
    return toy.write_model(folder, own_head=True, dtype=torch.float16, max_shard_size="50MB", **sizes)


def peak_rss() -> int:
    """Bytes, since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def held(backbone) -> int:
    """Bytes of parameters on this rank now: those that are whole, and the shards."""
    total = 0
    for parameter in backbone.parameters():
        total += parameter.data.nbytes
        shard = getattr(parameter, "ds_tensor", None)
        total += 0 if shard is None or parameter.ds_status.name == "INFLIGHT" else shard.nbytes
    return total


def watch(backbone) -> list[int]:
    """Keeps the greatest `held` of the passes to come in the list's only entry."""
    greatest = [0]

    def look(*_) -> None:
        greatest[0] = max(greatest[0], held(backbone))

    for module in backbone.modules():
        module.register_forward_pre_hook(look)
        module.register_forward_hook(look)
        module.register_full_backward_hook(look)
    return greatest


def work(folder: Path, json_name: str, out: Path) -> None:
    """One rank: load, three steps of one micro-batch, count."""
    import torch

    from bmtpt_ds.config import ModelConfig, deepspeed_json
    from bmtpt_ds.data.tokens import TokenRow
    from bmtpt_ds.losses import GradientPass
    from bmtpt_ds.parallel import Ranks, load_backbone
    from bmtpt_ds.phases import Phases
    from tests.one_step import gradient_of_rows

    ranks = Ranks(timeout=300)
    before = rss()
    model = load_backbone(ranks, ModelConfig(name_or_path=str(folder)), deepspeed_json.load(json_name))
    figures = {"rss_before": before, "rss_loading_peak": peak_rss(), "rss_loaded": rss()}
    greatest = watch(model.backbone)
    gradient_pass = GradientPass(model, 0, 10**9, 0, Phases(ranks.device))
    rows = [TokenRow(list(range(3, 30)), [40, 1]), TokenRow(list(range(3, 25)), [41, 1])]
    prompts = torch.randn(2, 20, 768)
    for step in range(1, STEPS + 1):
        gradient_of_rows(gradient_pass, prompts, rows, step)
    figures |= {
        "held": held(model.backbone),
        "peak": greatest[0],
        "rss_between_steps": rss(),
        "rss_peak": peak_rss(),
        "settings": {k: v for k, v in model.ds["zero_optimization"].items() if k != "stage"},
    }
    everyone = ranks.gather(figures)
    if ranks.first:
        out.write_text(json.dumps(everyone))
    ranks.leave()


def table(results: dict, parameters: int) -> str:
    lines = [f"{parameters / 1e6:.0f} M float32 parameters, {parameters * 4 / MB:.0f} MB; the fullest of 2 ranks, MB"]
    names = ("held", "peak", "rss_before", "rss_loading_peak", "rss_loaded", "rss_between_steps", "rss_peak")
    lines.append(f"{'':<20}" + "".join(f"{name:>12}" for name in results) + f"{'ratio':>10}")
    for name in names:
        values = [max(rank[name] for rank in ranks) for ranks in results.values()]
        ratio = values[-1] / values[0]
        lines.append(f"{name:<20}" + "".join(f"{v / MB:>12.0f}" for v in values) + f"{ratio:>10.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--work", nargs=3, metavar=("MODEL", "JSON", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        folder, json_name, out = options.work
        work(Path(folder), json_name, Path(out))
        return

    from importlib.metadata import version

    from tests import launch

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        parameters = make_checkpoint(folder)
        results = {}
        for json_name in ("resident", "zero3_cpu"):
            out = Path(scratch) / f"{json_name}.json"
            command = launch.deepspeed(
                RANKS, "--module", "tests.benchmarks.zero3_memory", "--work", folder, json_name, out
            )
            with launch.started(command, Path(scratch) / f"{json_name}.log") as job:
                status = job.wait()
                assert status == 0, job.text[-4000:]
            results[json_name] = json.loads(out.read_text())
    print(table(results, parameters))
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    line = {"date": date.today().isoformat(), "parameters": parameters, "versions": versions, **results}
    if options.out:
        options.out.write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
