"""Attention within the rows of packed tokens, all rows and heads in one launch; two for its gradient.

A program has a tile of one row's queries (or keys) and one head, and goes over the row's keys (or queries) in blocks:
scores never reach memory, and nothing is added atomically, so the outcome is the same to the bit in every run.

    forward    query tile:  softmax(scale q k' + bias) v, and the base-2 logarithm of each query's sum
    queries    query tile:  delta = sum of dO * O;  dS = P (dO v' - delta);  dq = scale dS k
    keys       key tile:    dv = P' dO;  dk = scale dS' q

Packed tensors are [tokens, heads * D], their rows `q_row` (queries and their gradients), `k_row` (keys, values and
theirs) and `out_row` apart: they may be columns of wider ones. `rows` [rows, 4]: first query, queries, first key, keys.
`seen` [rows]: how many of the keys are no padding, at least one. `tiles` [programs, 2]: row, number of the tile in it.
The bias [heads, queries, keys] is the same for all rows, shorter ones take its upper left part.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(tiles_ptr, rows_ptr, seen_ptr, q_row, k_row, out_row, D: tl.constexpr):
    """Number of this program's tile in its row; the row's first query, queries, keys, keys seen; where this head's
    values of its first query, of its first key and of its first query's output are."""
    row = tl.load(tiles_ptr + 2 * tl.program_id(0))
    number = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    rows_ptr += 4 * row
    first_query, queries = tl.load(rows_ptr), tl.load(rows_ptr + 1)
    first_key, keys = tl.load(rows_ptr + 2), tl.load(rows_ptr + 3)
    of_head = tl.program_id(1) * D
    at_query, at_key = first_query.to(tl.int64) * q_row + of_head, first_key.to(tl.int64) * k_row + of_head
    at_out = first_query.to(tl.int64) * out_row + of_head
    return number, first_query, queries, keys, tl.load(seen_ptr + row), at_query, at_key, at_out


@triton.jit
def load_tokens(ptr, tokens, inside, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Values [tokens, BLOCK_D] of one head."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + tokens[:, None] * row + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tokens(ptr, values, tokens, inside, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    values = values.to(ptr.dtype.element_ty)
    tl.store(ptr + tokens[:, None] * row + d[None, :], values, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def scores_of(
    a, b, scale, bias_ptr, at_bias, bias_a, bias_b, i, j, real, seen, BIAS: tl.constexpr
):  # fmt: skip
    """Base-2 scores of tokens i [I, 1] and j [1, J] from their values a [I, D] and b [J, D]; -inf where a key is not
    `seen`. Of queries that are not `real` a number, which nobody looks at."""
    scores = tl.dot(a, tl.trans(b)) * (scale * LOG2E)
    if BIAS:
        bias = tl.load(bias_ptr + at_bias + i * bias_a + j * bias_b, mask=real & seen, other=0.0)
        scores += bias.to(tl.float32) * LOG2E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def keys_of_block(
    begin, q, k_ptr, v_ptr, m, real, seen, scale, bias_ptr, at_bias, bias_row, k_row, D: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A block of keys and their values, and the scores of a tile's queries m."""
    n = begin + tl.arange(0, KEYS)
    k = load_tokens(k_ptr, n, n < seen, k_row, D, BLOCK_D)
    v = load_tokens(v_ptr, n, n < seen, k_row, D, BLOCK_D)
    s = scores_of(
        q, k, scale, bias_ptr, at_bias, bias_row, 1, m[:, None], n[None, :], real[:, None], (n < seen)[None, :], BIAS
    )  # fmt: skip
    return k, v, s


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, bias_ptr, rows_ptr, seen_ptr, tiles_ptr, total, q_row, k_row, out_row,
    bias_head, bias_row, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    number, first_query, queries, _keys, seen, at_query, at_key, at_out = place(
        tiles_ptr, rows_ptr, seen_ptr, q_row, k_row, out_row, D
    )
    head = tl.program_id(1)
    at_bias = head.to(tl.int64) * bias_head  # of rows of 16,384 tokens the ninth head's is beyond 32 bits
    m = number * QUERIES + tl.arange(0, QUERIES)
    real = m < queries
    q = load_tokens(q_ptr + at_query, m, real, q_row, D, BLOCK_D)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total_of = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for begin in tl.range(0, seen, KEYS):
        _k, v, s = keys_of_block(
            begin, q, k_ptr + at_key, v_ptr + at_key, m, real, seen, scale, bias_ptr, at_bias, bias_row, k_row,
            D, BLOCK_D, KEYS, BIAS,
        )  # fmt: skip
        above = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - above[:, None])
        shrink = tl.exp2(top - above)
        total_of = total_of * shrink + tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
        top = above
    store_tokens(out_ptr + at_out, out / total_of[:, None], m, real, out_row, D, BLOCK_D)
    tl.store(sums_ptr + head * total + first_query + m, top + tl.log2(total_of), mask=real)


@triton.jit(do_not_specialize=["total"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, of_q_ptr, delta_ptr, sums_ptr, bias_ptr, rows_ptr, seen_ptr, tiles_ptr,
    total, q_row, k_row, out_row, bias_head, bias_row, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    number, first_query, queries, _keys, seen, at_query, at_key, at_out = place(
        tiles_ptr, rows_ptr, seen_ptr, q_row, k_row, out_row, D
    )
    head = tl.program_id(1)
    at_bias = head.to(tl.int64) * bias_head  # of rows of 16,384 tokens the ninth head's is beyond 32 bits
    m = number * QUERIES + tl.arange(0, QUERIES)
    real = m < queries
    q = load_tokens(q_ptr + at_query, m, real, q_row, D, BLOCK_D)
    grad = load_tokens(grad_ptr + at_out, m, real, out_row, D, BLOCK_D)
    out = load_tokens(out_ptr + at_out, m, real, out_row, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    at_sums = head * total + first_query + m
    tl.store(delta_ptr + at_sums, delta, mask=real)
    sums = tl.load(sums_ptr + at_sums, mask=real, other=0.0)
    of_q = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for begin in tl.range(0, seen, KEYS):
        k, v, s = keys_of_block(
            begin, q, k_ptr + at_key, v_ptr + at_key, m, real, seen, scale, bias_ptr, at_bias, bias_row, k_row,
            D, BLOCK_D, KEYS, BIAS,
        )  # fmt: skip
        p = tl.exp2(s - sums[:, None])
        of_p = tl.dot(grad, tl.trans(v))
        of_s = p * (of_p - delta[:, None])
        of_q = tl.dot(of_s.to(k.dtype), k, of_q)
    store_tokens(of_q_ptr + at_query, of_q * scale, m, real, q_row, D, BLOCK_D)


@triton.jit(do_not_specialize=["total"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, of_k_ptr, of_v_ptr, delta_ptr, sums_ptr, bias_ptr, rows_ptr, seen_ptr, tiles_ptr,
    total, q_row, k_row, out_row, bias_head, bias_row, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    number, first_query, queries, keys, seen, at_query, at_key, at_out = place(
        tiles_ptr, rows_ptr, seen_ptr, q_row, k_row, out_row, D
    )
    head = tl.program_id(1)
    at_bias = head.to(tl.int64) * bias_head  # of rows of 16,384 tokens the ninth head's is beyond 32 bits
    n = number * KEYS + tl.arange(0, KEYS)
    k = load_tokens(k_ptr + at_key, n, n < seen, k_row, D, BLOCK_D)
    v = load_tokens(v_ptr + at_key, n, n < seen, k_row, D, BLOCK_D)
    of_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    of_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for begin in tl.range(0, queries, QUERIES):
        m = begin + tl.arange(0, QUERIES)
        real = m < queries
        q = load_tokens(q_ptr + at_query, m, real, q_row, D, BLOCK_D)
        grad = load_tokens(grad_ptr + at_out, m, real, out_row, D, BLOCK_D)
        at_sums = head * total + first_query + m
        sums = tl.load(sums_ptr + at_sums, mask=real, other=0.0)
        delta = tl.load(delta_ptr + at_sums, mask=real, other=0.0)
        s = scores_of(
            k, q, scale, bias_ptr, at_bias, 1, bias_row, n[:, None], m[None, :], real[None, :],
            (n < seen)[:, None], BIAS,
        )  # fmt: skip
        p = tl.exp2(s - sums[None, :])
        of_v = tl.dot(p.to(grad.dtype), grad, of_v)
        of_p = tl.dot(v, tl.trans(grad))
        of_s = p * (of_p - delta[None, :])
        of_k = tl.dot(of_s.to(q.dtype), q, of_k)
    store_tokens(of_k_ptr + at_key, of_k * scale, n, n < keys, k_row, D, BLOCK_D)
    store_tokens(of_v_ptr + at_key, of_v, n, n < keys, k_row, D, BLOCK_D)
