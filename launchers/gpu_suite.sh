#!/usr/bin/env bash
# Everything that wants a GPU, on a machine with one: launchers/gpu_suite.sh [--seconds N] [part ...]
# Takes the python3 that is there, with its torch, triton, transformers and deepspeed, and no network. Within 9 minutes it
# checks the SVGD kernels against float64, runs the tests that need a GPU, takes 20 steps of a source stage of t5-base's
# shape and has compute-sanitizer look on; then it times an SVGD step, profiles t5-base, t5-large and t5-3b (resident,
# with CUDA graphs and without; ZeRO-3; activations recomputed), times steps with graphs and without, and PEFT beside
# ours. What fails leaves the others running. One JSON and the logs go to $OUT (default tests/benchmarks/results), a short
# table to the terminal. Then `python -m tests.gpu.readme` puts the newest figures into README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m tests.gpu.suite --out "${OUT:-tests/benchmarks/results}" "$@"
