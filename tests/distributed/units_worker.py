"""Makes passes through sharded backbones and writes what was gathered and held meanwhile; started by `test_units.py`.

Arguments: a folder with `cases.json` (the model; of each case a DeepSpeed JSON, and whether to recompute), where each
rank writes `rank<r>.json`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from bmtpt_ds.config import ModelConfig
from bmtpt_ds.data.tokens import Batch
from bmtpt_ds.model.backbone import Backbone
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.parallel.measure import gathered_weights

ROWS, LENGTH = 3, 4


def blocks(backbone: Backbone) -> list[nn.Module]:
    return [*backbone.encoder.block, *backbone.decoder.block]


def numbers_there(flats: list[nn.Parameter]) -> int:
    """Of the blocks, whole or on their way."""
    return sum(flat.data.numel() for flat in flats)


def flat_parameters(backbone: Backbone) -> list[nn.Parameter]:
    """Not to be asked for inside a forward pass: DeepSpeed gathers what is."""
    return [block.matrices for block in blocks(backbone)]


def watch(backbone: Backbone) -> list[int]:
    """Its only entry is the most that was there whenever a layer of a block was at work."""
    greatest, flats = [0], flat_parameters(backbone)

    def look(*_) -> None:
        greatest[0] = max(greatest[0], numbers_there(flats))

    for block in blocks(backbone):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(look)
                layer.register_full_backward_hook(look)
    return greatest


@contextmanager
def outliving(backbone: Backbone) -> Iterator[list[str]]:
    """Inside, lists what autograd keeps of gathered memory that would stay when the block lets it go."""
    found: list[str] = []
    flats = flat_parameters(backbone)
    layers = [layer for block in blocks(backbone) for layer in block.modules() if isinstance(layer, nn.Linear)]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages = {flat.data.untyped_storage().data_ptr() for flat in flats if flat.data.numel()}
        if tensor.untyped_storage().data_ptr() in storages and not any(tensor is layer.weight for layer in layers):
            found.append(str(tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def rows(ranks: Ranks) -> Batch:
    draw = torch.Generator().manual_seed(ranks.rank)
    ids = torch.randint(3, 60, (ROWS, 5 + ranks.rank), generator=draw)
    return Batch(ids, None, torch.randint(3, 60, (ROWS, 2), generator=draw))


def passes(ranks: Ranks, model: Sharded, right: torch.Tensor) -> dict:
    """Three steps as of training, as many blocks there as settled."""
    backbone, batch = model.backbone, rows(ranks)
    backbone.train(backbone.train_while_tuning)
    greatest = watch(backbone)
    seen: dict[str, list] = {"gathers": [], "differs": [], "between": []}
    for _ in range(3):
        prompts = prompts_of(model).requires_grad_()
        with gathered_weights() as sent, outliving(backbone) as kept:
            backbone.row_losses(prompts, [batch]).sum().backward()
        seen["gathers"].append(sent)
        seen["differs"].append(((prompts.grad - right).norm() / right.norm()).item())
        seen["between"].append(numbers_there(flat_parameters(backbone)))
    return seen | {"greatest": greatest[0], "outliving": kept}


def passes_that_break_off(ranks: Ranks, model: Sharded, right: torch.Tensor) -> dict:
    """The encoder alone gathers the decoder's first block ahead, in vain; then a step."""
    backbone, batch, seen = model.backbone, rows(ranks), []
    alone = Batch(batch.source_ids, None, None)
    with torch.no_grad():
        for _ in range(2):
            backbone(prompts=prompts_of(model), buckets=[alone])
            seen.append(numbers_there(flat_parameters(backbone)))
    done = passes(ranks, model, right)
    with torch.no_grad():
        backbone.row_losses(prompts_of(model), [batch])
    return done | {"broken off": seen, "without gradient": numbers_there(flat_parameters(backbone))}


def prompts_of(model: Sharded) -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, model.hidden_size, generator=torch.Generator().manual_seed(7))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(timeout=120)
    asked = json.loads((folder / "cases.json").read_text())
    seen = {}

    def load(ds: dict, recompute: bool = False) -> Sharded:
        return load_backbone(ranks, ModelConfig(name_or_path=asked["model"], activation_checkpointing=recompute), ds)

    resident = load({})
    prompts = prompts_of(resident).requires_grad_()
    resident.backbone.row_losses(prompts, [rows(ranks)]).sum().backward()
    for case, (ds, recompute) in asked["cases"].items():
        work = passes_that_break_off if case == "broken off" else passes
        seen[case] = work(ranks, load(ds, recompute), prompts.grad)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.gather(None)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
