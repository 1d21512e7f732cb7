"""Time of a step of the source stage: PEFT's prompt tuning once per particle, one batch padded to the longest, ours.

All three have the same weights, rows, prompts (M particles of 100 tokens) and loss, and end with an update:
- `peft`: M adapters of PEFT's PromptTuning in turn, each with the step's rows padded to the longest, torch's AdamW.
- `plain`: transformers' T5 on one batch of M times as many rows padded to the longest, torch's AdamW.
- `ours`: what a run does: plan, collation, forward and backward pass without padding, SVGD with AdamW.

A row is a draw of the lengths of the paper's six source tasks. First the three gradients are compared, in float64: in
float32 a rounding now and then moves an input of a ReLU over 0, which changes a gradient by some 1e-4. Then the methods
take turns, several steps of different rows each (on a GPU rows that each has had before); medians and ratios are
of the same process, minutes and rows.

`bound` is ours on as many tokens in rows that are all equally long, which need no padding and a single bucket: what the
passes over these tokens cost at least. `of_bound` is bound / ours. `tokens` are those that a method computes over those
that must be computed.

    python -m tests.benchmarks.source_step [--model t5-small] [--repeats 5] [--out FILE]     ends with one JSON line
"""

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from transformers import T5Config, T5ForConditionalGeneration

from bmtpt_ds.config import ModelConfig, deepspeed_json
from bmtpt_ds.data.tokens import IGNORE, TokenRow, pad
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.phases import Phases
from bmtpt_ds.svgd import init_state, svgd_step_
from tests.benchmarks.json_line import write_line
from tests.one_step import gradient_of_rows

L = 100  # prompt tokens
LR = 0.3
TASKS = {  # mean source tokens, target tokens from and to
    "mnli": (40, 2, 2),
    "qnli": (50, 2, 2),
    "qqp": (35, 2, 2),
    "sst2": (20, 2, 2),
    "squad": (170, 3, 8),
    "record": (250, 3, 8),
}
SHAPES = {
    "t5-small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64},
    "t5-large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "d_kv": 64},
    "t5-3b": {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
}
Step = Callable[[Sequence[TokenRow]], torch.Tensor]  # rows -> gradient [M, L, H] of each prompt's loss


def draw_rows(seed: int) -> list[TokenRow]:
    """A row of each task."""
    draw = random.Random(seed)
    rows = []
    for mean, least, most in TASKS.values():
        length = min(512, max(5, int(draw.lognormvariate(math.log(mean) - 0.08, 0.4))))
        target = [draw.randint(3, 32000) for _ in range(draw.randint(least, most) - 1)]
        rows.append(TokenRow([draw.randint(3, 32000) for _ in range(length - 1)] + [1], [*target, 1]))
    return rows


def equally_long(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """As many rows of as many tokens in all, up to rounding, of one length."""
    source = round(statistics.fmean(len(row.source) for row in rows))
    target = round(statistics.fmean(len(row.target) for row in rows))
    return [TokenRow([7] * source, [7] * target) for _ in rows]


def padded(rows: Sequence[TokenRow], device: torch.device) -> dict[str, torch.Tensor]:
    mask = pad([[1] * len(row.source) for row in rows], 0)
    labels = pad([row.target for row in rows], IGNORE)
    ids = pad([row.source for row in rows], 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return losses.sum(dim=1) / (labels != IGNORE).sum(dim=1)


def peft_step(model: T5ForConditionalGeneration, prompts: torch.Tensor) -> Step:
    names = [f"particle{i}" for i in range(len(prompts))]
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=L, num_transformer_submodules=1, tokenizer_name_or_path=None
    )
    tuned = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        tuned.add_adapter(name, config)
    thetas = [tuned.prompt_encoder[name].embedding.weight for name in names]
    for theta, prompt in zip(thetas, prompts, strict=True):
        theta.data = prompt.clone()  # float32
        theta.requires_grad_()
    optimizers = [torch.optim.AdamW([theta], lr=LR, weight_decay=0.0) for theta in thetas]
    tuned.eval()

    def step(rows: Sequence[TokenRow]) -> torch.Tensor:
        batch = padded(rows, prompts.device)
        for name, optimizer in zip(names, optimizers, strict=True):
            tuned.set_adapter(name)
            optimizer.zero_grad()
            logits = tuned(**batch).logits
            row_losses(logits, batch["labels"]).mean().backward()
            optimizer.step()
        return torch.stack([theta.grad for theta in thetas])

    return step


def plain_step(model: T5ForConditionalGeneration, prompts: torch.Tensor) -> Step:
    theta = torch.nn.Parameter(prompts.clone())
    optimizer = torch.optim.AdamW([theta], lr=LR, weight_decay=0.0)
    model = model.requires_grad_(False).eval()

    def step(rows: Sequence[TokenRow]) -> torch.Tensor:
        batch = {name: values.repeat(len(theta), 1) for name, values in padded(rows, prompts.device).items()}
        embedded = model.shared(batch["input_ids"])
        prefix = theta.to(embedded.dtype).repeat_interleave(len(rows), dim=0)
        mask = torch.cat([batch["attention_mask"].new_ones(len(embedded), L), batch["attention_mask"]], dim=1)
        optimizer.zero_grad()
        logits = model(
            inputs_embeds=torch.cat([prefix, embedded], dim=1), attention_mask=mask, labels=batch["labels"]
        ).logits
        (row_losses(logits, batch["labels"]).sum() / len(rows)).backward()
        optimizer.step()
        return theta.grad

    return step


def gradient_pass_of(model: Sharded) -> GradientPass:
    return GradientPass(model, 0, model.token_budget("auto", L + 512), 0, Phases(model.ranks.device))


def our_step(gradient_pass: GradientPass, prompts: torch.Tensor) -> Step:
    theta = prompts.clone()
    particles = theta.view(len(theta), -1)  # [M, D]
    state = init_state(particles, "adamw")

    def step(rows: Sequence[TokenRow]) -> torch.Tensor:
        gradient = gradient_of_rows(gradient_pass, theta, rows).gradient
        svgd_step_(particles, gradient.view_as(particles), state, lr=LR, score_scale=-1.0)
        return gradient

    return step


def make_model(shape: str, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    config = T5Config(**SHAPES[shape], vocab_size=32128, dropout_rate=0.0, decoder_start_token_id=0)
    with device:
        model = T5ForConditionalGeneration(config)
    torch.set_default_dtype(before)
    model.save_pretrained(folder)


def seconds(step: Step, rows: Sequence[TokenRow], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step(rows)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def token_shares(rows: Sequence[TokenRow], M: int, gradient_pass: GradientPass) -> dict[str, float]:
    """Tokens that a method computes over those that must be computed."""
    needed = M * sum(L + len(row.source) + len(row.target) for row in rows)
    longest = M * len(rows) * (L + max(len(row.source) for row in rows) + max(len(row.target) for row in rows))
    passes = gradient_pass.prepare(StepRows.evenly(rows), M, L).passes
    ours = sum(own.tokens if own.table is None else own.table.sizes.tokens for own in passes)
    return {"peft": longest / needed, "plain": longest / needed, "ours": ours / needed}


def gradient_errors(
    loaded: T5ForConditionalGeneration, ours: Sharded, prompts: torch.Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Relative differences from PEFT's gradients."""
    loaded.double(), ours.backbone.double()
    steps = {
        "plain": plain_step(loaded, prompts),
        "ours": our_step(gradient_pass_of(ours), prompts),
        "peft": peft_step(loaded, prompts),
    }
    found = {name: step(draw_rows(0)) for name, step in steps.items()}
    loaded.to(dtype), ours.backbone.to(dtype)
    for name in ("plain", "ours"):
        found[name] = ((found[name] - found["peft"]).norm() / found["peft"].norm()).item()
        assert found[name] < 1e-4, f"{name}: another gradient than PEFT's"
    return {name: found[name] for name in ("plain", "ours")}


def measure(shape: str, M: int, repeats: int) -> dict:
    ranks = Ranks(timeout=600)
    device, dtype = ranks.device, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder), dtype, device)
        loaded = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
        backbone = ModelConfig(name_or_path=folder, dtype=str(dtype).removeprefix("torch."))
        ds = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": dtype == torch.bfloat16}}
        ours = load_backbone(ranks, backbone, deepspeed_json.load("resident") if device.type == "cpu" else ds)
    prompts = loaded.shared.weight.detach()[:: 32128 // (M * L)][: M * L].float().view(M, L, -1).clone()
    # in float64 a GPU's memory does not hold the padded batch of five, at t5-3b not that of two
    errors = gradient_errors(loaded, ours, prompts[: 1 if shape == "t5-3b" else 2], dtype)
    gradient_pass = gradient_pass_of(ours)
    steps = {
        "plain": plain_step(loaded, prompts),
        "ours": our_step(gradient_pass, prompts),
        "bound": our_step(gradient_pass, prompts),
        "peft": peft_step(loaded, prompts),
    }
    # warm; on a GPU with all that comes, whose sizes memory, libraries and graphs meet then: graphs of the smaller ones
    # twice, where a larger one comes later
    for seed in [*range(repeats + 1)] * 2 if device.type == "cuda" else [0]:
        for name, step in steps.items():
            step(equally_long(draw_rows(seed)) if name == "bound" else draw_rows(seed))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for seed in range(1, repeats + 1):
        for name, step in steps.items():
            rows = draw_rows(seed)
            times[name].append(seconds(step, equally_long(rows) if name == "bound" else rows, device))
    shares = [token_shares(draw_rows(seed), M, gradient_pass) for seed in range(1, repeats + 1)]
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = {
        name: [x / y for x, y in zip(times[name], times["ours"], strict=True)] for name in ("peft", "plain", "bound")
    }
    return {
        "model": shape,
        "M": M,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "gradient_errors": errors,
        "seconds": medians,
        "over_ours": {name: statistics.median(ratios[name]) for name in ("peft", "plain")},
        "of_bound": statistics.median(ratios["bound"]),
        "tokens": {name: statistics.fmean(share[name] for share in shares) for name in shares[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="t5-small")
    parser.add_argument("--particles", type=int, default=5, metavar="M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}
    found = {"date": str(date.today()), "versions": versions} | measure(
        options.model, options.particles, options.repeats
    )
    print(f"{'':8}{'s a step':>10}{'over ours':>11}{'tokens':>9}")
    for name, spent in found["seconds"].items():
        tokens = found["tokens"].get(name, 1.0)
        print(f"{name:8}{spent:10.3f}{spent / found['seconds']['ours']:11.2f}{tokens:9.2f}")
    write_line(found, options.out)


if __name__ == "__main__":
    main()
