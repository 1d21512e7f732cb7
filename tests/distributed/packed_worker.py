"""Makes steps with blocks that run whole, by Triton's interpreter, and as transformers' layers; started by
`test_packed_passes.py`.

Arguments: a folder with `cases.json` (the model; of each case a DeepSpeed JSON, and whether to recompute), where each
rank writes `rank<r>.json`.
"""

import json
import sys
from pathlib import Path

import torch

from bmtpt_ds.config import ModelConfig
from bmtpt_ds.data.tokens import TokenRow
from bmtpt_ds.losses import GradientPass, StepGradient
from bmtpt_ds.model import frozen
from bmtpt_ds.model.packed_pass import PackedPass
from bmtpt_ds.parallel import Ranks, load_backbone
from bmtpt_ds.phases import Phases
from tests.one_step import gradient_of_rows

# the second step's rows are as many tokens, rounded, as the first's; the third's are more
STEPS = [[(5, 2), (17, 3), (9, 1)], [(6, 2), (15, 3), (9, 2)], [(70, 2), (30, 1), (4, 1)]]
LENGTH = 4


def steps(ranks: Ranks, model: str, ds: dict, recompute: bool) -> list[StepGradient]:
    config = ModelConfig(name_or_path=model, max_source_length=128, activation_checkpointing=recompute)
    loaded = load_backbone(ranks, config, ds)
    loaded.backbone.train(loaded.backbone.train_while_tuning)
    passes = GradientPass(loaded, 0, 10_000, 0, Phases(ranks.device))
    found = []
    for number, lengths in enumerate(STEPS, 1):
        rows = [TokenRow(*([3 + (7 * i + number) % 50 for i in range(n)] for n in pair)) for pair in lengths]
        prompts = torch.randn(2, LENGTH, loaded.hidden_size, generator=torch.Generator().manual_seed(number))
        found.append(gradient_of_rows(passes, prompts, rows, number))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(timeout=120)
    asked = json.loads((folder / "cases.json").read_text())
    right = steps(ranks, asked["model"], {}, False)
    packed, forward = [], PackedPass.forward
    PackedPass.forward = lambda *inputs: packed.append(1) or forward(*inputs)
    frozen.WHOLE = frozenset({("cpu", torch.float32)})
    seen = {}
    for case, (ds, recompute) in asked["cases"].items():
        packed.clear()
        found = steps(ranks, asked["model"], ds, recompute)
        errors = [
            ((one.gradient - other.gradient).norm() / other.gradient.norm()).item()
            for one, other in zip(found, right, strict=True)
        ]
        errors += [(one.losses - other.losses).abs().max().item() for one, other in zip(found, right, strict=True)]
        seen[case] = {"packed": len(packed), "errors": errors}
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.gather(None)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
