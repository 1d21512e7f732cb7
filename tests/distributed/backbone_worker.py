"""Loads backbones on every rank and writes what the ranks hold and compute; started by `test_backbone.py`.

Arguments: the folder of the cases (`cases.json`, `<case>.safetensors`), where each rank writes `rank<r>.json` and
`<case>.rank<r>.safetensors`.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from safetensors.torch import load_file, save_file

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import Batch, load_tokenizer
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone, sharding
from bmtpt_ds.parallel.measure import gathered_weights


def load(ranks: Ranks, model: str, ds: str) -> Sharded:
    return load_backbone(ranks, ModelConfig(name_or_path=model), deepspeed_json.load(ds))


def held(backbone) -> dict[str, int]:
    """Elements of each sharded parameter that this rank holds beyond its shard, and of the blocks' weights."""
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, torch.nn.Linear) and ".block." in name}
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    sharded = {name: p for name, p in backbone.named_parameters() if hasattr(p, "ds_id")}
    return {name: t.data.numel() for name, t in (weights | sharded).items()}


def shards(backbone) -> dict[str, list]:
    """Of each sharded parameter: its elements, and those of this rank's shard."""
    return {name: [p.ds_numel, p.ds_tensor.numel()] for name, p in backbone.named_parameters() if hasattr(p, "ds_id")}


def unsharded(backbone) -> dict[str, int]:
    """Elements of each parameter that every rank has."""
    return {name: p.numel() for name, p in backbone.named_parameters() if not hasattr(p, "ds_id")}


def load_and_compute(ranks: Ranks, folder: Path, case: str, model: str) -> dict:
    """What the rank holds after each stage of loading and after each step; its part of the batch computed."""
    seen = {}
    build = sharding.build_sharded

    def build_and_look(*inputs, **named):
        built = build(*inputs, **named)
        backbone = built.backbone
        seen["built"], seen["shards"], seen["unsharded"] = held(backbone), shards(backbone), unsharded(backbone)
        return built

    sharding.build_sharded = build_and_look
    try:
        sharded = load(ranks, model, "zero3_cpu")
    finally:
        sharding.build_sharded = build
    seen["threshold"] = sharded.ds["zero_optimization"]["stage3_param_persistence_threshold"]
    seen["gathers"] = []
    seen["trainable"] = [name for name, p in sharded.backbone.named_parameters() if p.requires_grad]
    optimizers = (torch.optim.Optimizer, DeepSpeedOptimizer)
    seen["optimizers"] = [str(type(o)) for o in gc.get_objects() if isinstance(o, optimizers)]

    batch = {
        name: t[ranks.rank :: ranks.world].contiguous() for name, t in load_file(folder / f"{case}.safetensors").items()
    }
    rows = Batch(batch["source_ids"], batch["source_mask"], batch["labels"])
    seen["after steps"] = []
    for _ in range(3):  # ZeRO-3 learns the order in the first pass and gathers ahead in the later ones
        prompts = batch["prompts"].clone().requires_grad_()
        with gathered_weights() as sent:
            losses = sharded.backbone.row_losses(prompts, [rows])
            losses.sum().backward()
        seen["gathers"].append(sent)
        seen["after steps"].append(held(sharded.backbone))
    seen["gradients of weights"] = [name for name, p in sharded.backbone.named_parameters() if p.grad is not None]
    save_file({"losses": losses.detach(), "gradient": prompts.grad}, folder / f"{case}.rank{ranks.rank}.safetensors")
    return seen


def load_with_wrong_weight(ranks: Ranks, model: str, wrong: str) -> str | None:
    """The error when one weight is not what the checkpoint has after filling."""
    fill = sharding.fill

    def fill_wrongly(ranks_, tensors, *inputs):
        result = fill(ranks_, tensors, *inputs)
        here, _ = next(tensor for tensor in tensors if tensor.name == wrong).here()
        here[-2:] = here[-2:].flip(0)  # two neighbours change places: sums stay, order does not
        return result

    sharding.fill = fill_wrongly
    try:
        load(ranks, model, "zero3_cpu")
    except RuntimeError as error:
        return str(error)
    finally:
        sharding.fill = fill
    return None


def peak_of_loading(ranks: Ranks, model: str, ds: str) -> int:
    """Bytes by which loading raises the highest resident memory of this process."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    sharded = load(ranks, model, ds)
    peak = _status("VmHWM") - before
    del sharded
    return peak


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def translate(ranks: Ranks, model: str, source: str, target: str) -> dict:
    """Loss of a translation, and the greedy one, with no prompt in front."""
    sharded = load(ranks, model, "zero3_cpu")
    tokenizer = load_tokenizer(sharded.folder)
    encoded = tokenizer([source], return_tensors="pt")
    labels = tokenizer([target], return_tensors="pt").input_ids
    nothing = torch.zeros(1, 0, sharded.hidden_size)
    rows = Batch(encoded.input_ids, None, labels)
    with torch.no_grad():
        loss = sharded.backbone.row_losses(nothing, [rows]).item()
    written = sharded.backbone.generate_ids(nothing, rows, max_new_tokens=20, synced=sharded.synced)
    return {"loss": loss, "text": tokenizer.batch_decode(written, skip_special_tokens=True)[0]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(timeout=120)
    cases = json.loads((folder / "cases.json").read_text())
    seen = {}
    load(ranks, cases["models"]["tied"], "zero3_cpu") if "large" in cases else None  # buffers made once
    for ds in ("zero3_cpu", "resident") if "large" in cases else ():
        ranks.gather(None)
        seen[f"peak {ds}"] = peak_of_loading(ranks, cases["large"], ds)
    for case, model in cases.get("models", {}).items():
        seen[case] = load_and_compute(ranks, folder, case, model)
    seen["wrong"] = {
        wrong: load_with_wrong_weight(ranks, model, wrong) for wrong, model in cases.get("wrong", {}).items()
    }
    if "translate" in cases:
        seen["translate"] = translate(ranks, *cases["translate"])
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.gather(None)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
