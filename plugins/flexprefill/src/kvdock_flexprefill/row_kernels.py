"""The rows of query-aware heads, and the lists of all heads, in Triton.

Which heads are query-aware is known on the device only: every program of `pool` and `row_logits`
looks at its head's flag first and ends at once where it is not set.

Shapes as in `kernels.py`; M block rows of queries.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)
# ruff: noqa: SIM102  (the compiler evaluates both sides of `and`)

from __future__ import annotations

import triton
import triton.language as tl

from kvdock_flexprefill.kernels import covering, tile

LENGTHS = ("q_length", "k_length", "first", "block_rows", "blocks")
"""As in `kernels.py`."""


@triton.jit
def _mean(
    base, row, start, begin, end, output,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Average rows ``begin … end`` of the block at ``start``; ``base`` is where row 0 would be."""
    d, r = tl.arange(0, PADDED), start + tl.arange(0, BLOCK)
    inside = (r >= begin) & (r < end)
    states = tile(base, row, r.to(tl.int64), inside, d, HEAD_DIM, PADDED, False, True)
    count = tl.minimum(start + BLOCK, end) - tl.maximum(start, begin)
    tl.store(output + d, tl.sum(states, 0) / count, mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=LENGTHS)
def pool(
    q, k, aware, query_means, key_means,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    pairs, heads, kv_heads, q_length, k_length, first, block_rows, blocks,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Average one block of queries, or of keys, where its head or one of its group needs it.

    Args:
        query_means: float32 [b·H, M, D]. key_means: float32 [b·K, Nk, D].
    """
    m = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    if pair < pairs:
        if m < block_rows:
            if tl.load(aware + pair) != 0:
                past = k_length - q_length
                base = q + (pair // heads) * q_batch + (pair % heads) * q_head
                _mean(
                    base - tl.cast(past, tl.int64) * q_row, q_row, (first + m) * BLOCK, past,
                    k_length, query_means + (pair * block_rows + m) * HEAD_DIM,
                    HEAD_DIM, PADDED, BLOCK,
                )  # fmt: skip
    else:
        pair -= pairs
        needed = tl.load(aware + pair * GROUP).to(tl.int32)
        for g in range(1, GROUP):
            needed += tl.load(aware + pair * GROUP + g).to(tl.int32)
        if needed != 0:
            base = k + (pair // kv_heads) * k_batch + (pair % kv_heads) * k_head
            _mean(
                base, k_row, m * BLOCK, 0, k_length, key_means + (pair * blocks + m) * HEAD_DIM,
                HEAD_DIM, PADDED, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS[2:])
def row_logits(
    query_means, key_means, aware, logits, first, block_rows, blocks, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Score pooled queries against pooled keys, in base 2, up to the diagonal.

    Args:
        logits: float32 [b·H, M, Nk]; heads that are not query-aware are left as they are.
    """
    pair = tl.program_id(2).to(tl.int64)
    if tl.load(aware + pair) != 0:
        top, left = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
        if left < first + top + ROWS:
            m, j, d = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
            query = tile(
                query_means + pair * block_rows * HEAD_DIM, HEAD_DIM, m, m < block_rows, d,
                HEAD_DIM, PADDED, False, False,
            )  # fmt: skip
            key = tile(
                key_means + (pair // GROUP) * blocks * HEAD_DIM, HEAD_DIM, j, j < blocks, d,
                HEAD_DIM, PADDED, False, False,
            )  # fmt: skip
            scores = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
            place = logits + (pair * block_rows + m)[:, None] * blocks + j[None, :]
            seen = (m < block_rows)[:, None] & (j[None, :] <= (first + m)[:, None])
            tl.store(place, scores, mask=seen)


@triton.jit
def write_list(kept, index, count, line, blocks, j):
    """Write one line's list: the blocks kept, then the others."""
    before = tl.cumsum(kept.to(tl.int32), 0)
    total = tl.sum(kept.to(tl.int32), 0)
    place = tl.where(kept, before - 1, total + j - before)
    tl.store(index + line * blocks + place, j, mask=j < blocks)
    tl.store(count + line, total)


@triton.jit(do_not_specialize=LENGTHS[2:])
def emit(
    chosen, aware, logits, count, index,
    pairs, first, block_rows, blocks, gamma,
    WIDTH: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Write one row's list: verticals, slashes, and what a query-aware row covers.

    ``logits`` and ``index`` share their memory, int32 or float32 [b·H, M, Nk]: a row's scores have
    all been read when its list is written over them. Blocks not chosen follow the list.
    """
    m = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    i = first + m
    j = tl.arange(0, WIDTH)
    causal = j <= i
    kept = tl.load(chosen + pair * blocks + j, mask=causal, other=0) != 0
    slash = chosen + (pairs + pair) * blocks + i
    kept = kept | (tl.load(slash - j, mask=causal, other=0) != 0)
    row = (pair * block_rows + m) * blocks
    if PATTERN:
        if tl.load(aware + pair) != 0:
            scores = tl.load(logits + row + j, mask=causal, other=float("-inf"))
            share = tl.exp2(scores - tl.max(scores, 0))
            share = share / tl.sum(share, 0)
            kept = kept | covering(share, share, causal, gamma, 1, WIDTH, WIDTH)
    write_list(kept, index, count, pair * block_rows + m, blocks, j)
