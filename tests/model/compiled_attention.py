"""Compiles the attention kernels for a GPU that need not be there, and prints what became of each as a line of JSON.

    python -m tests.model.compiled_attention CAPABILITY d ...

For each number of values a head: attention of the encoder (a bias, long rows) and over the encoder (none, short rows).
"""

import json
import os
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from bmtpt_ds.model import attention_kernels as kernels
from bmtpt_ds.model.attention import OPTIONS, Tiling
from bmtpt_ds.model.packed import Span
from tests.svgd.compiled import barrier, resources, source_of

HEADS, KEYS = 12, 250


def main() -> None:
    capability, *sizes = map(int, sys.argv[1:])
    for d in sizes:
        for queries in (KEYS, 8):
            compile_all(capability, d, queries)


def compile_all(capability: int, d: int, queries: int) -> None:
    position = torch.zeros(1, HEADS, 256, 256, dtype=torch.bfloat16) if queries == KEYS else None
    span, cpu = Span(5, queries, KEYS, position), torch.device("cpu")
    tiling = Tiling.of([span], cpu, heads=HEADS, d=d, scale=1.0, capability=divmod(capability, 10))
    q, k = (torch.zeros(5 * tokens, HEADS * d, dtype=torch.bfloat16) for tokens in (queries, KEYS))
    sums = torch.zeros(HEADS, len(q))
    for kernel, tensors in (
        (kernels.forward_kernel, (q, k, k, q, sums)),
        (kernels.queries_kernel, (q, k, k, q, q, q, sums, sums)),
        (kernels.keys_kernel, (q, k, k, q, k, k, sums, sums)),
    ):
        arguments = dict(zip(kernel.arg_names, tensors, strict=False)) | {"tiles_ptr": tiling.query_tiles}
        arguments |= {"q_row": 3 * HEADS * d, "k_row": 3 * HEADS * d, "out_row": HEADS * d}
        source = source_of(kernel, arguments | tiling.arguments)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
        line = {"kernel": kernel.__name__, "d": d, "queries": queries, "shared": binary.metadata.shared}
        line |= {"stack": resources(binary.asm["cubin"])["stack"]}
        print(json.dumps(line | {"float_atomics": barrier(binary.asm["ptx"])["float_atomics"]}), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
