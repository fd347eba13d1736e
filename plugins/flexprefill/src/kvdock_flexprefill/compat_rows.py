"""The published rows of query-aware heads, which share one budget, and the lists, in Triton.

Shapes as in `kernels.py`; M block rows of queries.
"""

# ruff: noqa: ANN001, ANN201  (a kernel's arguments are the compiler's values, not Python's)
# ruff: noqa: SIM102  (the compiler evaluates both sides of `and`)

from __future__ import annotations

import triton
import triton.language as tl

from kvdock_flexprefill.compat_kernels import next_edge, room_at
from kvdock_flexprefill.row_kernels import write_list

LENGTHS = ("first", "block_rows", "blocks")
"""As in `kernels.py`."""


@triton.jit(do_not_specialize=LENGTHS)
def row_shares(logits, aware, first, block_rows, blocks, WIDTH: tl.constexpr):
    """Turn one row's scores of a query-aware head into shares, in place up to the diagonal."""
    m = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    if tl.load(aware + pair) != 0:
        j = tl.arange(0, WIDTH)
        place = logits + (pair * block_rows + m) * blocks + j
        scores = tl.load(place, mask=j <= first + m, other=float("-inf"))
        share = tl.exp2(scores - tl.max(scores, 0))
        tl.store(place, share / tl.sum(share, 0), mask=j <= first + m)


@triton.jit(do_not_specialize=LENGTHS)
def find_edge(
    shares, aware, edge, room, ties, first, block_rows, blocks, gamma,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the smallest share of a query-aware head's rows that is still kept.

    Args:
        shares: float32 [pairs, M, Nk] of `row_shares`.
        edge, room: int32 [pairs]; larger bits than ``edge`` are kept, ``room`` of the equal ones.
        ties: int32 [pairs, M], the equal ones of each row.
    """
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(aware + pair) != 0:
        shares += pair * block_rows * blocks
        m, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        limit = gamma * block_rows
        low, step = blocks * 0, blocks * 0 + (1 << 28)
        for _ in range(15):
            one = tl.zeros([ROWS, COLUMNS], tl.float32)
            two = tl.zeros([ROWS, COLUMNS], tl.float32)
            three = tl.zeros([ROWS, COLUMNS], tl.float32)
            for top in range(0, block_rows, ROWS):
                for left in range(0, tl.minimum(first + top + ROWS, blocks), COLUMNS):
                    row, column = (top + m)[:, None], (left + j)[None, :]
                    inside = (row < block_rows) & (column <= first + row)
                    part = tl.load(shares + row * blocks + column, mask=inside, other=0.0)
                    bits = part.to(tl.int32, bitcast=True) - low
                    one += tl.where(bits >= step, part, 0.0)
                    two += tl.where(bits >= 2 * step, part, 0.0)
                    three += tl.where(bits >= 3 * step, part, 0.0)
            low = next_edge(low, step, one, two, three, limit)
            step = step // 4
        held = tl.zeros([ROWS, COLUMNS], tl.float32)
        for top in range(0, block_rows, ROWS):
            equal = tl.zeros([ROWS], tl.int32)
            for left in range(0, tl.minimum(first + top + ROWS, blocks), COLUMNS):
                row, column = (top + m)[:, None], (left + j)[None, :]
                inside = (row < block_rows) & (column <= first + row)
                part = tl.load(shares + row * blocks + column, mask=inside, other=0.0)
                bits = part.to(tl.int32, bitcast=True)
                held += tl.where(bits > low, part, 0.0)
                equal += tl.sum((inside & (bits == low)).to(tl.int32), 1)
            tl.store(ties + pair * block_rows + top + m, equal, mask=top + m < block_rows)
        tl.store(edge + pair, low)
        tl.store(room + pair, room_at(low, tl.sum(held.to(tl.float64)), limit))


@triton.jit(do_not_specialize=LENGTHS)
def emit_compat(
    chosen, aware, shares, edge, room, ties, count, index,
    pairs, first, block_rows, blocks,
    WIDTH: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Write one row's list: verticals, slashes, and a query-aware head's kept shares.

    ``shares`` and ``index`` share their memory, as in `row_kernels.emit`; the other arguments are
    those of `decide_compat` and `find_edge`.
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
            place = shares + (pair * block_rows + m) * blocks + j
            share = tl.load(place, mask=causal, other=0.0)
            bits, low = share.to(tl.int32, bitcast=True), tl.load(edge + pair)
            before = tl.sum(tl.load(ties + pair * block_rows + j, mask=j < m, other=0), 0)
            equal = causal & (bits == low) & (share > 0)
            fits = before + tl.cumsum(equal.to(tl.int32), 0) <= tl.load(room + pair)
            kept = kept | (bits > low) | (equal & fits)
    write_list(kept, index, count, pair * block_rows + m, blocks, j)
