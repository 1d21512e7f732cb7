"""The compiled kernels against the reference in float64, at the sizes of real prompts.

    python -m tests.gpu.accuracy [--out FILE]       a minute, most of it Triton's compiling; ends with one JSON line

For each size, dtype of the scores and optimizer: ten steps by the fused kernel and by two launches, and at each the
relative error of the direction (norm of the difference over the norm). Exit status 1 if one is above 1e-5.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from bmtpt_ds.svgd import init_state, svgd_direction, svgd_step_
from bmtpt_ds.svgd.fused import Fused

CASES = [
    *((M, 102_400, torch.float32, "adamw") for M in (1, 2, 5, 8, 10, 16, 32)),
    (5, 76_800, torch.float32, "sgd"),
    (5, 102_400, torch.bfloat16, "adamw"),
    (5, 1_000_000, torch.float32, "adamw"),
    (10, 1_000_001, torch.bfloat16, "sgd"),
    (3, 7, torch.float32, "adamw"),
]
TOLERANCE = 1e-5
STEPS = 10


def error_of(M: int, D: int, dtype: torch.dtype, optimizer: str, backend: Fused) -> float:
    """The greatest over ten steps, of the direction and of what a step makes of the particles."""
    theta = 30 * torch.randn(M, D, device="cuda", generator=torch.Generator("cuda").manual_seed(M + D))
    state, worst = init_state(theta, optimizer), 0.0
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in state.items()}
    for step in range(STEPS):
        noise = torch.randn(M, D, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        score = (noise - theta / 30).to(dtype)
        found = svgd_direction(theta, score, backend=backend).direction
        right = svgd_direction(theta.double(), score.double(), backend="reference").direction
        worst = max(worst, ((found.double() - right).norm() / right.norm()).item())
        for name, tensor in exact.items():  # each step from the same place: Adam magnifies what differs
            tensor.copy_(state[name])
        before = theta.double()
        moved = before.clone()
        svgd_step_(moved, score.double(), exact, optimizer=optimizer, lr=0.3, clip_norm=1.0, backend="reference")
        svgd_step_(theta, score, state, optimizer=optimizer, lr=0.3, clip_norm=1.0, backend=backend)
        # of the particles themselves: a step of 0.3 at magnitude 30 has an error of rounding of its own
        worst = max(worst, ((theta.double() - moved).norm() / moved.norm()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON line")
    out = parser.parse_args().out
    found = []
    for M, D, dtype, optimizer in CASES:
        for name, backend in {"fused": Fused(), "two launches": Fused(one_launch=False)}.items():
            began = time.perf_counter()
            error = error_of(M, D, dtype, optimizer, backend)
            case = {"M": M, "D": D, "scores": str(dtype), "optimizer": optimizer, "way": name, "error": error}
            found.append(case | {"seconds": round(time.perf_counter() - began, 1)})
            print(*found[-1].values(), sep="  ", flush=True)
    worst = max(case["error"] for case in found)
    line = json.dumps({"worst": worst, "tolerance": TOLERANCE, "cases": found})
    if out:
        out.write_text(line + "\n")
    print(line)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
