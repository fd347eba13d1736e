"""The published rows of query-aware heads, which share one budget, and the lists, in Triton.

Shapes as in `kernels.py`; M block rows of queries. The shares of a head's rows lie packed, each row
up to its diagonal: E of them, in memory for a multiple of 16.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)
# ruff: noqa: SIM102  (the compiler evaluates both sides of `and`)

from __future__ import annotations

import triton
import triton.language as tl

from kvdock_flexprefill.kernels import tile
from kvdock_flexprefill.row_kernels import write_list
from kvdock_flexprefill.search_kernels import find, room_at

LENGTHS = ("first", "block_rows", "blocks")
"""As in `kernels.py`."""


@triton.jit
def _begin(m, first):
    """Return where row m begins among the packed."""
    return m * (first + 1) + m * (m - 1) // 2


@triton.jit
def _packed(first, block_rows):
    """Return the size of a head's memory."""
    return tl.multiple_of((_begin(block_rows, first) + 15) // 16 * 16, 16)


@triton.jit
def _scores(
    query, key_means, left, m, first, blocks, scale, d,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Score pooled queries [R, D] against pooled keys, in base 2, up to the diagonal."""
    j = left + tl.arange(0, COLUMNS)
    key = tile(key_means, HEAD_DIM, j, j < blocks, d, HEAD_DIM, PADDED, False, False)
    scores = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    return tl.where(j[None, :] <= (first + m)[:, None], scores, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def row_shares(
    query_means, key_means, aware, shares, first, block_rows, blocks, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Share out the pooled attention of ``ROWS`` rows of a query-aware head.

    Args:
        query_means, key_means: of `row_kernels.pool`. shares: float32 [pairs, E].
    """
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(aware + pair) != 0:
        # the longest rows first
        top = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
        m, d = top + tl.arange(0, ROWS), tl.arange(0, PADDED)
        query = tile(
            query_means + pair * block_rows * HEAD_DIM, HEAD_DIM, m, m < block_rows, d,
            HEAD_DIM, PADDED, False, False,
        )  # fmt: skip
        keys = key_means + (pair // GROUP) * blocks * HEAD_DIM
        end = tl.minimum(first + top + ROWS, blocks)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for left in range(0, end, COLUMNS):
            scores = _scores(
                query, keys, left, m, first, blocks, scale, d, HEAD_DIM, PADDED, COLUMNS
            )
            higher = tl.maximum(highest, tl.max(scores, 1))  # finite: every row sees block 0
            total = total * tl.exp2(highest - higher)
            total += tl.sum(tl.exp2(scores - higher[:, None]), 1)
            highest = higher
        shares += pair * _packed(first, block_rows)
        for left in range(0, end, COLUMNS):
            scores = _scores(
                query, keys, left, m, first, blocks, scale, d, HEAD_DIM, PADDED, COLUMNS
            )
            j = left + tl.arange(0, COLUMNS)
            share = tl.exp2(scores - highest[:, None]) / total[:, None]
            seen = (m < block_rows)[:, None] & (j[None, :] <= (first + m)[:, None])
            tl.store(shares + _begin(m, first)[:, None] + j[None, :], share, mask=seen)
        if tl.program_id(0) == 0:
            beyond = _begin(block_rows, first) + tl.arange(0, 16)
            tl.store(shares + beyond, 0.0, mask=beyond < _packed(first, block_rows))


@triton.jit(do_not_specialize=LENGTHS[:2])
def find_edge(
    shares, aware, slots, edge, last, first, block_rows, gamma,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Find the smallest share of a query-aware head's rows that is still kept.

    Args:
        shares: of `row_shares`. slots: int32 [pairs, 1 + SLOTS].
        edge, last: int32 [pairs]; larger bits than ``edge`` are kept, and the equal ones up to
            place ``last`` of the packed shares.
    """
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(aware + pair) != 0:
        size = _packed(first, block_rows)
        shares += pair * size
        limit = gamma * block_rows
        low, held, _, equal = find(
            shares, size, 1.0 * block_rows, limit, slots + pair * (1 + SLOTS), CHUNK, SLOTS
        )
        room = tl.minimum(room_at(low, held, limit), equal)
        kept = size * 0 - 1
        if room > 0:
            e = tl.arange(0, CHUNK)
            seen = size * 0
            for start in range(0, size, CHUNK):
                part = tl.load(shares + start + e, mask=start + e < size, other=0.0)
                hit = (part.to(tl.int32, bitcast=True) == low).to(tl.int32)
                fits = (hit > 0) & (seen + tl.cumsum(hit, 0) <= room)
                kept = tl.maximum(kept, tl.max(tl.where(fits, start + e, -1), 0))
                seen += tl.sum(hit, 0)
        tl.store(edge + pair, low)
        tl.store(last + pair, kept)


@triton.jit(do_not_specialize=LENGTHS)
def emit_compat(
    chosen, aware, shares, edge, last, count, index,
    pairs, first, block_rows, blocks,
    WIDTH: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Write one row's list: verticals, slashes, and a query-aware head's kept shares.

    The arguments are those of `compat_kernels.choose` and `find_edge`.
    """
    m = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    i = first + m
    j = tl.arange(0, WIDTH)
    causal = j <= i
    kept = tl.load(chosen + pair * blocks + j, mask=causal, other=0) != 0
    slash = chosen + (pairs + pair) * blocks + i
    kept = kept | (tl.load(slash - j, mask=causal, other=0) != 0)
    if PATTERN:
        if tl.load(aware + pair) != 0:
            place = _begin(m, first) + j
            share = tl.load(
                shares + pair * _packed(first, block_rows) + place, mask=causal, other=0.0
            )
            bits, low = share.to(tl.int32, bitcast=True), tl.load(edge + pair)
            equal = causal & (bits == low) & (place <= tl.load(last + pair))
            kept = kept | (bits > low) | equal
    write_list(kept, index, count, pair * block_rows + m, blocks, j)
