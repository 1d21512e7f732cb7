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
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, StepGradient
from bmtpt_ds.model import frozen
from bmtpt_ds.model.packed_pass import PackedPass
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.parallel.measure import gathered_weights
from bmtpt_ds.phases import Phases
from tests.interpreter import patch_language_once_a_kernel
from tests.one_step import gradient_of_rows

# the second step's rows are as many tokens, rounded, as the first's; the third's are more
STEPS = [[(5, 2), (17, 3), (9, 1)], [(6, 2), (15, 3), (9, 2)], [(40, 2), (30, 1), (4, 1)]]
LENGTH = 4


def load(ranks: Ranks, model: str, ds: dict, recompute: bool) -> Sharded:
    config = ModelConfig(name_or_path=model, max_source_length=128, activation_checkpointing=recompute)
    loaded = load_backbone(ranks, config, ds)
    loaded.backbone.train(loaded.backbone.train_while_tuning)
    return loaded


def rows_of(number: int) -> list[TokenRow]:
    return [TokenRow(*([3 + (7 * i + number) % 50 for i in range(n)] for n in pair)) for pair in STEPS[number - 1]]


def prompts_of(model: Sharded, number: int) -> torch.Tensor:
    return torch.randn(2, LENGTH, model.hidden_size, generator=torch.Generator().manual_seed(number))


def steps(model: Sharded) -> list[StepGradient]:
    passes = GradientPass(model, 0, 10_000, 0, Phases(model.ranks.device))
    numbers = range(1, len(STEPS) + 1)
    return [gradient_of_rows(passes, prompts_of(model, number), rows_of(number), number) for number in numbers]


def gathers(model: Sharded, *, prepared_meanwhile: bool) -> list[int]:
    """Of a step, while another one is prepared or not: bytes sent in each."""
    passes = GradientPass(model, 0, 10_000, 0, Phases(model.ranks.device))

    def prepare(*_: object) -> None:
        if prepared_meanwhile:
            passes.prepare(StepRows.evenly(rows_of(2)), 2, LENGTH)

    blocks = [*model.backbone.encoder.block, *model.backbone.decoder.block]
    hooks = [block.register_forward_pre_hook(prepare) for block in blocks]
    with gathered_weights() as sent:
        gradient_of_rows(passes, prompts_of(model, 1), rows_of(1))
    for hook in hooks:
        hook.remove()
    return sent


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    patch_language_once_a_kernel()
    ranks = Ranks(timeout=120)
    asked = json.loads((folder / "cases.json").read_text())
    right = steps(load(ranks, asked["model"], {}, False))
    packed, forward = [], PackedPass.forward
    PackedPass.forward = lambda *inputs: packed.append(1) or forward(*inputs)
    frozen.WHOLE = frozenset({("cpu", torch.float32)})
    seen = {}
    for case, (ds, recompute) in asked["cases"].items():
        packed.clear()
        model = load(ranks, asked["model"], ds, recompute)
        found = steps(model)
        errors = [
            ((one.gradient - other.gradient).norm() / other.gradient.norm()).item()
            for one, other in zip(found, right, strict=True)
        ]
        errors += [(one.losses - other.losses).abs().max().item() for one, other in zip(found, right, strict=True)]
        seen[case] = {"packed": len(packed), "errors": errors}
        if case == "ZeRO-3":
            seen[case]["gathers"] = [gathers(model, prepared_meanwhile=meanwhile) for meanwhile in (False, True)]
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.gather(None)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
