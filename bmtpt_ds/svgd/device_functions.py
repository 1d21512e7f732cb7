"""What the kernels are made of: programs that wait for each other, tiles, and the parts of the algorithm.

Symbols: M particles, D numbers in a particle; ROWS = M rounded up to a power of two, BLOCK columns in a tile, GRID
programs; PAIRS = M (M - 1) / 2 pairs of particles, of which (i, j) with j < i has the number i (i - 1) / 2 + j; SLOTS,
a power of two that is PAIRS + 2 or more.
"""

import triton
import triton.language as tl

H_FLOOR = tl.constexpr(1e-12)  # as in reference.py

# words of `sync`
BARRIER = tl.constexpr(0)
TICKETS = tl.constexpr(1)
GENERATION = tl.constexpr(2)  # of the last launch that came to its end
ARRIVALS = tl.constexpr(1024)  # more than the programs of a launch


# ---- programs that wait for each other ----


@triton.jit
def generation_of(sync_ptr, epoch):
    """A number that grows with every launch.

    `epoch`, 1 or more, is counted by the host, so what a launch that was broken off has left behind is always of an
    earlier generation. A graph is replayed with the same epoch each time: it comes on top of the last generation.
    """
    return epoch + tl.load(sync_ptr + GENERATION)


@triton.jit
def arrive(word_ptr, generation, order: tl.constexpr):
    """Counts this program in and returns how many were there before it. What it has stored comes first.

    The first one of a generation lifts the word above all that went before.
    """
    first = generation * ARRIVALS
    tl.debug_barrier()
    tl.atomic_max(word_ptr, first, sem="relaxed")
    return tl.atomic_add(word_ptr, 1, sem=order) - first


@triton.jit
def wait_for_all(word_ptr, generation, GRID: tl.constexpr):
    """The barrier of the grid: returns when all its programs are here, and sees what they stored before."""
    arrive(word_ptr, generation, "release")
    everyone = generation * ARRIVALS + GRID
    arrived = everyone - GRID
    while arrived < everyone:
        arrived = tl.atomic_add(word_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def sum_over_programs(ptr, GRID: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """[GRID, WIDTH] -> [WIDTH], in an order that depends on nothing but these numbers."""
    column = tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros([WIDTH], tl.float32)
    for first in tl.range(0, GRID, CHUNK):
        program = first + tl.arange(0, CHUNK)[:, None]
        shares = tl.load(ptr + program * WIDTH + column, mask=(program < GRID) & (column >= 0), other=0.0)
        sums += tl.sum(shares, axis=0)
    return sums


# ---- tiles ----


@triton.jit
def place(columns, D, rows, ROWS: tl.constexpr):
    """Where a tile lies in a tensor with D columns, and which of its numbers are in the first `rows` rows."""
    row = tl.arange(0, ROWS)[:, None]
    return row.to(tl.int64) * D + columns[None, :], (row < rows) & (columns < D)[None, :]


@triton.jit
def load_tile(ptr, columns, D, M, ROWS: tl.constexpr):
    """[ROWS, BLOCK] as float32; zeros beyond M and D."""
    offset, inside = place(columns, D, M, ROWS)
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, values, columns, D, rows):
    """Stores the first `rows` rows."""
    offset, inside = place(columns, D, rows, values.shape[0])
    tl.store(ptr + offset, values, mask=inside)


@triton.jit
def load_row(ptr, j, columns, D):
    """Row j at the tile's columns, [BLOCK]."""
    return tl.load(ptr + tl.cast(j, tl.int64) * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def is_bad(score):
    """1 where a score is inf or nan: the one is not below inf, the other neither."""
    return tl.where(tl.abs(score) < float("inf"), 0.0, 1.0)


# ---- the algorithm ----


@triton.jit
def pair(i, j):
    """The number of a pair of different particles, whichever comes first."""
    high = tl.maximum(i, j)
    return high * (high - 1) // 2 + tl.minimum(i, j)


@triton.jit
def shares_in_registers(theta, score, M: tl.constexpr, PAIRS: tl.constexpr, SLOTS: tl.constexpr):
    """A tile's share of all that is summed over the programs, [SLOTS]: distances, scores' squares, bad scores.

    One row a number, so that a single reduction adds up them all; rows of theta are found without a comparison, for
    the loops are unrolled. Direct differences: a Gram product cancels when particles lie close together far from the
    origin.
    """
    row = tl.arange(0, theta.shape[0])[:, None]
    slot = tl.arange(0, SLOTS)[:, None]
    squares = tl.sum(score * score, axis=0)
    addends = tl.where(slot == PAIRS, squares[None, :], 0.0)
    addends = tl.where(slot == PAIRS + 1, tl.sum(is_bad(score), axis=0)[None, :], addends)
    for i in tl.static_range(1, M):
        theta_i = tl.sum(tl.where(row == i, theta, 0.0), axis=0)
        for j in tl.static_range(i):
            apart = theta_i - tl.sum(tl.where(row == j, theta, 0.0), axis=0)
            addends = tl.where(slot == i * (i - 1) // 2 + j, (apart * apart)[None, :], addends)
    return tl.sum(addends, axis=1)


@triton.jit
def squared_distances(theta, theta_ptr, columns, D, count):
    """A tile's share of them, [ROWS, ROWS], where the rows come once more from the cache.

    `count` is M, hidden from the compiler: unrolled ten times, the loop would want more registers than there are.
    """
    ROWS: tl.constexpr = theta.shape[0]
    particle = tl.arange(0, ROWS)[:, None]
    r2 = tl.zeros([ROWS, ROWS], tl.float32)
    for i in tl.range(count):
        apart = theta - load_row(theta_ptr, i, columns, D)[None, :]
        r2 += tl.where(particle == i, tl.sum(apart * apart, axis=1)[None, :], 0.0)
    return r2


@triton.jit
def one_of(values, index):
    """One of a vector's values, some of which may be inf or nan."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0.0), axis=0)


@triton.jit
def median_of(r2, PAIRS: tl.constexpr):
    """Exact; of an even count the mean of the two middle values."""
    ordered = tl.sort(tl.where(tl.arange(0, r2.shape[0]) < PAIRS, r2, float("inf")))
    return (one_of(ordered, (PAIRS - 1) // 2) + one_of(ordered, PAIRS // 2)) / 2


@triton.jit
def bandwidth_and_damping(
    r2, D, bandwidth, damping, M: tl.constexpr, PAIRS: tl.constexpr, BANDWIDTH: tl.constexpr, MATCHED: tl.constexpr
):
    """h and lambda. `bandwidth` is what BANDWIDTH ("median", "squared", "fixed") multiplies; `damping` is lambda."""
    h = 1.0
    lam = 1.0
    if M > 1:
        median = median_of(r2, PAIRS)
        if BANDWIDTH == "median":
            h = median * bandwidth
        elif BANDWIDTH == "squared":
            h = median * median * bandwidth
        else:
            h = bandwidth
        h = tl.maximum(h, H_FLOOR)
        lam = damping
        if MATCHED:
            c = median / h
            lam = tl.exp(-c) * (1.0 + c * M / D)
    return h, lam


@triton.jit
def direction_in_registers(
    theta, score, kernel_ptr, lam, drive_scale, repulsion_scale, M: tl.constexpr
):  # fmt: skip
    """phi [ROWS, BLOCK] of a tile, and the squares of drive and repulsion, [BLOCK] each.

    Row by row, so that nothing is computed for the rows that only round M up; K comes as scalars.
    """
    row = tl.arange(0, theta.shape[0])[:, None]
    phi = tl.zeros_like(theta)
    drive_squares = tl.sum(phi, axis=0)
    repulsion_squares = tl.sum(phi, axis=0)
    for i in tl.static_range(M):
        theta_i = tl.sum(tl.where(row == i, theta, 0.0), axis=0)
        drive = lam * tl.sum(tl.where(row == i, score, 0.0), axis=0)
        apart = tl.zeros_like(drive)
        for j in tl.static_range(M):
            if i != j:
                K_ij = tl.load(kernel_ptr + pair(i, j))
                drive += K_ij * tl.sum(tl.where(row == j, score, 0.0), axis=0)
                apart += K_ij * (theta_i - tl.sum(tl.where(row == j, theta, 0.0), axis=0))
        drive *= drive_scale
        apart *= repulsion_scale
        drive_squares += drive * drive
        repulsion_squares += apart * apart
        phi = tl.where(row == i, (drive + apart)[None, :], phi)
    return phi, drive_squares, repulsion_squares


@triton.jit
def direction(
    theta, theta_ptr, score_ptr, kernel_ptr, columns, D, count, score_scale, lam, drive_scale, repulsion_scale
):  # fmt: skip
    """As direction_in_registers, where the rows come once more from the cache."""
    i = tl.arange(0, theta.shape[0])
    drive = tl.zeros_like(theta)
    apart = tl.zeros_like(theta)
    for j in tl.range(count):
        K_j = tl.load(kernel_ptr + pair(i, j), mask=(i < count) & (i != j), other=0.0)
        score_j = load_row(score_ptr, j, columns, D) * score_scale
        drive += tl.where(i == j, lam, K_j)[:, None] * score_j[None, :]
        apart += K_j[:, None] * (theta - load_row(theta_ptr, j, columns, D)[None, :])
    drive *= drive_scale
    apart *= repulsion_scale
    return drive + apart, tl.sum(drive * drive, axis=0), tl.sum(apart * apart, axis=0)


@triton.jit
def adam_scalars(step_ptr, lr, log_beta1, log_beta2):
    """lr / (1 - beta1^t) and sqrt(1 - beta2^t) of this step; in float64, for at t = 1 float32 leaves four digits."""
    t = (tl.load(step_ptr) + 1).to(tl.float64)
    step_size = lr / (1.0 - tl.exp(t * log_beta1))
    root2 = tl.sqrt(1.0 - tl.exp(t * log_beta2))
    return step_size.to(tl.float32), root2.to(tl.float32)


@triton.jit
def adam(theta, phi, exp_avg, exp_avg_sq, step_size, root2, decay, weight1, beta2, weight2, eps):
    """The moved tile and the new moments. Scalars: of adam_scalars, then 1 - beta1, beta2, 1 - beta2."""
    exp_avg += (-phi - exp_avg) * weight1  # the gradient is -phi
    exp_avg_sq = exp_avg_sq * beta2 + phi * phi * weight2
    return theta * decay - step_size * exp_avg / (tl.sqrt(exp_avg_sq) / root2 + eps), exp_avg, exp_avg_sq
