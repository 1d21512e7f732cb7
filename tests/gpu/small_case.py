"""A few steps on small particles, for compute-sanitizer: every kernel, with and without a tile held in registers."""

import torch

from bmtpt_ds.svgd import init_state, svgd_direction, svgd_step_
from bmtpt_ds.svgd.fused import Fused


def main() -> None:
    for M, D in ((5, 1500), (10, 1500)):
        for optimizer in ("adamw", "sgd"):
            theta, score = torch.randn(2, M, D, device="cuda").unbind()
            state = init_state(theta, optimizer)
            for backend in (Fused(programs=4), Fused(programs=4, one_launch=False)):
                svgd_step_(theta, score, state, lr=0.1, optimizer=optimizer, clip_norm=1.0, backend=backend)
                svgd_direction(theta, score, backend=backend)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
