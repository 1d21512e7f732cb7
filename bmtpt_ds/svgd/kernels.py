"""The SVGD step on a GPU. One launch: distances, a barrier of the whole grid, then kernel, direction and optimizer.

A program owns the tiles pid, pid + GRID, ... of all M particles:

    theta, score --> squared distances of its columns, a number a pair --> partials [GRID, SLOTS]
                     ================ barrier: all partials are there ================
    partials --> sums, in the same order in every program --> median --> h, lambda, K [PAIRS]
    theta, score, K --> drive, repulsion --> optimizer --> theta and moments, in place
                \\--> their norms, two numbers --> [GRID, 2] --> the program that comes last adds them up and reports

Sums are trees of a fixed shape and no floating-point number is added atomically: for one grid the outcome is the same
to the bit in every run. device_functions.py has the symbols and the parts.
"""

import triton
import triton.language as tl

from .device_functions import (
    BARRIER,
    GENERATION,
    TICKETS,
    adam,
    adam_scalars,
    arrive,
    bandwidth_and_damping,
    direction,
    direction_in_registers,
    generation_of,
    is_bad,
    load_tile,
    one_of,
    pair,
    shares_in_registers,
    squared_distances,
    store_tile,
    sum_over_programs,
    wait_for_all,
)

CLIP_EPS = tl.constexpr(1e-6)  # as torch.nn.utils.clip_grad_norm_ has it


@triton.jit
def measure(
    theta_ptr, score_ptr, partial_ptr, D, count, score_scale,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr, TILES: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """First half: stores this program's share of what must be summed over all."""
    pid = tl.program_id(0)
    r2 = tl.zeros([ROWS, ROWS], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(TILES):
        columns = (pid + t * GRID) * BLOCK + tl.arange(0, BLOCK)
        score = load_tile(score_ptr, columns, D, M, ROWS) * score_scale
        squares += tl.sum(score * score, axis=0)
        bad += tl.sum(is_bad(score), axis=0)
        theta = load_tile(theta_ptr, columns, D, M, ROWS)
        r2 += squared_distances(theta, theta_ptr, columns, D, count)
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    tl.store(partial_ptr + pair(i, j), r2, mask=(j < i) & (i < M))
    tl.store(partial_ptr + PAIRS, tl.sum(squares, axis=0))
    tl.store(partial_ptr + PAIRS + 1, tl.sum(bad, axis=0))


@triton.jit
def report(
    report_ptr, matrix_ptr, kernel_ptr, step_ptr, skipped_ptr, norms, K, h, lam, finite,
    M: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """What the last program of a launch writes for all of them."""
    mean = 1.0
    if M > 1:
        mean = tl.sum(tl.where(tl.arange(0, K.shape[0]) < PAIRS, K, 0.0), axis=0) / PAIRS
    tl.store(report_ptr, h)
    tl.store(report_ptr + 1, lam)
    tl.store(report_ptr + 2, mean)
    tl.store(report_ptr + 3, tl.sqrt(one_of(norms, 0)))
    tl.store(report_ptr + 4, tl.sqrt(one_of(norms, 1)))
    if OPTIMIZER == "none":
        i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        inside = (i < M) & (j < M)
        values = tl.load(kernel_ptr + pair(i, j), mask=inside & (i != j), other=1.0)
        tl.store(matrix_ptr + i * M + j, values, mask=inside)
    else:
        tl.store(step_ptr, tl.load(step_ptr) + tl.where(finite, 1, 0))
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(finite, 0, 1))


@triton.jit(do_not_specialize=["epoch", "count"])
def step_kernel(
    theta_ptr, score_ptr, out_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, skipped_ptr,
    sync_ptr, partial_ptr, kernel_ptr, norm_ptr, report_ptr, matrix_ptr, epoch, D, count,
    bandwidth, damping, repulsion_scale, clip_norm, score_scale,
    lr, weight_decay, weight1, log_beta1, beta2, weight2, log_beta2, eps,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr, TILES: tl.constexpr,
    PAIRS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr, FUSED: tl.constexpr,
    BANDWIDTH: tl.constexpr, MATCHED: tl.constexpr, CLIP: tl.constexpr, OPTIMIZER: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """The whole step if FUSED, by a cooperative launch: all programs must run at once. Else its second half.

    OPTIMIZER "none" leaves theta alone and stores phi at out_ptr, K at matrix_ptr. A program that owns one tile may
    have it HELD in registers across the barrier: only then are the inputs read once.
    """
    pid = tl.program_id(0)
    generation = generation_of(sync_ptr, epoch)
    if HELD:
        columns = pid * BLOCK + tl.arange(0, BLOCK)
        theta = load_tile(theta_ptr, columns, D, M, ROWS)
        score = load_tile(score_ptr, columns, D, M, ROWS) * score_scale
        if OPTIMIZER == "adam":  # on their way while the programs wait for each other
            exp_avg = load_tile(exp_avg_ptr, columns, D, M, ROWS)
            exp_avg_sq = load_tile(exp_avg_sq_ptr, columns, D, M, ROWS)
        shares = shares_in_registers(theta, score, M, PAIRS, SLOTS)
        tl.store(partial_ptr + pid * SLOTS + tl.arange(0, SLOTS), shares)
    elif FUSED:
        measure(
            theta_ptr, score_ptr, partial_ptr + pid * SLOTS, D, count, score_scale, M, ROWS, BLOCK, GRID, TILES, PAIRS
        )  # fmt: skip
    if FUSED:
        wait_for_all(sync_ptr + BARRIER, generation, GRID)

    sums = sum_over_programs(partial_ptr, GRID, SLOTS, CHUNK)
    r2 = tl.where(tl.arange(0, SLOTS) < PAIRS, sums, 0.0)
    finite = one_of(sums, PAIRS + 1) == 0.0
    rows = tl.where(finite, M, 0)  # that may change
    h, lam = bandwidth_and_damping(r2, D, bandwidth, damping, M, PAIRS, BANDWIDTH, MATCHED)
    K = tl.exp(-r2 / h)
    kernel_ptr += pid * SLOTS  # through memory, for every thread needs every value
    tl.store(kernel_ptr + tl.arange(0, SLOTS), K)
    tl.debug_barrier()

    drive_scale = 1.0 / M
    if CLIP:
        drive_scale *= tl.minimum(clip_norm / (tl.sqrt(one_of(sums, PAIRS)) + CLIP_EPS), 1.0)
    repulsion_scale = repulsion_scale * 2.0 / h / M
    rate = tl.load(lr).to(tl.float32) if LR_ON_DEVICE else lr
    decay = 1.0 - rate * weight_decay
    if OPTIMIZER == "adam":
        step_size, root2 = adam_scalars(step_ptr, rate, log_beta1, log_beta2)

    drive_squares = tl.zeros([BLOCK], tl.float32)
    repulsion_squares = tl.zeros([BLOCK], tl.float32)
    for t in tl.range(TILES):
        columns = (pid + t * GRID) * BLOCK + tl.arange(0, BLOCK)
        if HELD:
            phi, drive, repulsion = direction_in_registers(
                theta, score, kernel_ptr, lam, drive_scale, repulsion_scale, M
            )  # fmt: skip
        else:
            theta = load_tile(theta_ptr, columns, D, M, ROWS)
            phi, drive, repulsion = direction(
                theta, theta_ptr, score_ptr, kernel_ptr, columns, D, count,
                score_scale, lam, drive_scale, repulsion_scale,
            )  # fmt: skip
            tl.debug_barrier()  # before the tile changes: other warps may still read rows of it
        drive_squares += drive
        repulsion_squares += repulsion
        if OPTIMIZER == "none":
            store_tile(out_ptr, phi, columns, D, M)
        elif OPTIMIZER == "sgd":
            store_tile(theta_ptr, theta * decay + rate * phi, columns, D, rows)
        else:
            if not HELD:
                exp_avg = load_tile(exp_avg_ptr, columns, D, M, ROWS)
                exp_avg_sq = load_tile(exp_avg_sq_ptr, columns, D, M, ROWS)
            theta, exp_avg, exp_avg_sq = adam(
                theta, phi, exp_avg, exp_avg_sq, step_size, root2, decay, weight1, beta2, weight2, eps
            )  # fmt: skip
            store_tile(theta_ptr, theta, columns, D, rows)
            store_tile(exp_avg_ptr, exp_avg, columns, D, rows)
            store_tile(exp_avg_sq_ptr, exp_avg_sq, columns, D, rows)

    tl.store(norm_ptr + pid * 2, tl.sum(drive_squares, axis=0))
    tl.store(norm_ptr + pid * 2 + 1, tl.sum(repulsion_squares, axis=0))
    before = arrive(sync_ptr + TICKETS, generation, "acq_rel")
    tl.debug_barrier()
    if before == GRID - 1:
        norms = sum_over_programs(norm_ptr, GRID, 2, CHUNK)
        report(
            report_ptr, matrix_ptr, kernel_ptr, step_ptr, skipped_ptr, norms, K, h, lam, finite,
            M, ROWS, PAIRS, OPTIMIZER,
        )  # fmt: skip
        tl.store(sync_ptr + GENERATION, generation)


@triton.jit(do_not_specialize=["count"])
def distances_kernel(
    theta_ptr, score_ptr, partial_ptr, D, count, score_scale,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr, TILES: tl.constexpr,
    PAIRS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The first of two launches, where a device does not start a whole grid at once."""
    partial_ptr += tl.program_id(0) * SLOTS
    measure(theta_ptr, score_ptr, partial_ptr, D, count, score_scale, M, ROWS, BLOCK, GRID, TILES, PAIRS)
