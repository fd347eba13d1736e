"""Block-sparse attention in Triton: one program per block of queries and head.

A program takes the last listed block first, with a mask: only the diagonal block holds keys that
some of its queries do not see, and it gives every query a finite maximum at once. All other blocks
are seen whole, so that the loop over them masks nothing.

Shapes: b rows, H query heads, K key/value heads, Q queries, N keys, D head_dim, M block rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(
    source, head_offset, start, stride, n, d, length,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load rows ``start …`` of one head, [KEYS, PADDED]; what does not exist is zero."""
    if DESCRIPTORS:
        return source.load([start, head_offset])
    else:  # noqa: RET505  (both branches would be compiled without it)
        base = source + head_offset + tl.cast(start, tl.int64) * stride
        offset = n[:, None] * stride + d[None, :]
        shown = (d < HEAD_DIM)[None, :]
        if WHOLE and HEAD_DIM == PADDED:
            rows = tl.load(base + offset)
        elif WHOLE:
            rows = tl.load(base + offset, mask=shown, other=0.0)
        else:
            rows = tl.load(base + offset, mask=(start + n < length)[:, None] & shown, other=0.0)
        return rows


@triton.jit
def _scores(query, key, UPCAST: tl.constexpr):
    if UPCAST:
        key = key.to(tl.float32)
    return tl.dot(query, tl.trans(key), input_precision="ieee")


@triton.jit
def _accumulate(total, top, states, scores, value, scale, UPCAST: tl.constexpr):
    """Take one step's scores and values into the running sum, maximum and output."""
    higher = tl.maximum(top, tl.max(scores, 1) * scale)  # the scale is positive
    share = tl.exp2(scores * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(share, 1)
    states = states * fade[:, None]
    if UPCAST:
        value = value.to(tl.float32)
    states = tl.dot(share.to(value.dtype), value, states, input_precision="ieee")
    return total, higher, states


@triton.jit
def attend_row(
    q, k, v, out, lse, count, index,
    q_head, q_row, k_head, k_row, v_head, v_row, i_head, i_row,
    heads, block_rows, first_block, past, q_length, k_length, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BY_HEAD: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend for ROWS queries of one head; rows with long lists, the last, start first."""
    PARTS: tl.constexpr = BLOCK // ROWS
    STEPS: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0)
    part = program % PARTS
    program = program // PARTS
    if BY_HEAD:  # the heads of a group side by side: they read the same keys
        member = program % GROUP
        block_row = block_rows - 1 - (program // GROUP) % block_rows
        head = program // GROUP // block_rows * GROUP + member
    else:
        head = program % heads
        block_row = block_rows - 1 - program // heads
    kv_head = head // GROUP
    listed = tl.load(count + head * block_rows + block_row)
    entries = index + tl.cast(head, tl.int64) * i_head + tl.cast(block_row, tl.int64) * i_row

    m, n, d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    begin = (first_block + block_row) * BLOCK + part * ROWS
    position = begin + m
    real = (position >= past) & (position < k_length)
    shown = real[:, None] & (d < HEAD_DIM)[None, :]
    q_base = q + tl.cast(head, tl.int64) * q_head + tl.cast(begin - past, tl.int64) * q_row
    query = tl.load(q_base + m[:, None] * q_row + d[None, :], mask=shown, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)

    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    states = tl.zeros([ROWS, PADDED], tl.float32)
    if DESCRIPTORS:  # a column of the descriptor
        k_offset, v_offset = kv_head * k_head, kv_head * v_head
    else:
        k_offset = tl.cast(kv_head, tl.int64) * k_head
        v_offset = tl.cast(kv_head, tl.int64) * v_head
    last = tl.load(entries + tl.maximum(listed - 1, 0)) * BLOCK
    end = tl.minimum(tl.minimum(last + BLOCK, begin + ROWS), k_length)
    end = tl.where(listed > 0, end, last)
    for start in tl.range(last, end, KEYS, num_stages=1):
        key = _rows(k, k_offset, start, k_row, n, d, k_length, HEAD_DIM, PADDED, False, DESCRIPTORS)
        value = _rows(
            v, v_offset, start, v_row, n, d, k_length, HEAD_DIM, PADDED, False, DESCRIPTORS
        )
        scores = _scores(query, key, UPCAST)
        column = start + n
        seen = (column[None, :] <= position[:, None]) & (column < k_length)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        total, top, states = _accumulate(total, top, states, scores, value, scale, UPCAST)

    steps = (listed - 1) * STEPS
    start = tl.load(entries) * BLOCK
    for step in tl.range(0, steps, num_stages=STAGES):
        key = _rows(k, k_offset, start, k_row, n, d, k_length, HEAD_DIM, PADDED, True, DESCRIPTORS)
        value = _rows(
            v, v_offset, start, v_row, n, d, k_length, HEAD_DIM, PADDED, True, DESCRIPTORS
        )
        # the next step's address is known one step early
        start = tl.load(entries + (step + 1) // STEPS) * BLOCK + (step + 1) % STEPS * KEYS
        scores = _scores(query, key, UPCAST)
        total, top, states = _accumulate(total, top, states, scores, value, scale, UPCAST)

    states = states * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    out_row = tl.cast(heads, tl.int64) * HEAD_DIM
    out_base = out + tl.cast(begin - past, tl.int64) * out_row + head * HEAD_DIM
    tl.store(out_base + m[:, None] * out_row + d[None, :], states.to(out.dtype.element_ty), shown)
    if LSE:
        level = tl.where(total > 0, top + tl.log2(total), float("-inf")) / 1.4426950408889634
        tl.store(lse + tl.cast(head, tl.int64) * q_length + (position - past), level, mask=real)
