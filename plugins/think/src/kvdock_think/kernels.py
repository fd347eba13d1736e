"""Attention over narrow and whole keys in Triton: one kernel for a step and for many queries.

A program takes a share of one key/value head's tokens for a block of query rows (the group of
query heads, times the queries). Logits are in base 2 here, so that exp2 takes them as they are.

Shapes: B rows, H query heads, K key/value heads, G = H/K, Q queries, D head_dim, D' kept channels,
S splits.
"""

# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvdock.kernels.split_kv import merge_splits, multiprocessors, split_count
from kvdock_think.attention import Cursor, Entries

LARGEST_HEAD = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tile:
    """Say how the work is cut.

    Args:
        tokens: taken at a time.
        resident: programs meant to share a multiprocessor.
        masked: load D' channels in one power of two with idle lanes, not in two parts (64 + 16).
    """

    tokens: int = 64
    warps: int = 4
    stages: int = 3
    resident: int = 2
    masked: bool = False


STEP_TILE = Tile(stages=2, resident=3)
MANY_TILE = Tile(warps=4, stages=2, resident=1)
LARGE_TILE = Tile(tokens=32, stages=2)
MOST_ROWS = 64
"""Query rows of a program where many queries attend."""


def serves(query: Tensor, entries: Entries) -> bool:
    """Say whether the kernel takes this data type and these heads."""
    largest = max(query.shape[-1], entries.values.shape[-1])
    return largest <= LARGEST_HEAD.get(query.dtype, 0) and query.dtype == entries.keys.dtype


def attend(
    query: Tensor,
    entries: Entries,
    scaling: float,
    dtype: torch.dtype = torch.float32,
    *,
    cursor: Cursor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with queries [B, H, Q, D] over all entries of their rows, without a mask.

    Args:
        cursor: what the rows hold, where it is not what ``entries`` say.

    Returns:
        [B, H, Q, Dv] in ``dtype``, and the natural log-sum-exps, float32 [B, H, Q].
    """
    batch, heads, queries, head_dim = query.shape
    keys, rest, values = entries.keys, entries.rest, entries.values
    kv_heads, kept, value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
    rows = heads // kv_heads * queries
    block = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    tile = tile or _default_tile(query, block)
    blocks = triton.cdiv(rows, block)
    if cursor is None and not entries.even:
        cursor = Cursor.of(entries)
    if splits is None:
        grid = batch * kv_heads * blocks
        count = multiprocessors(query.device)
        longest = entries.live[0] if cursor is None else cursor.longest
        splits = split_count(grid, count, longest, tile=tile.tokens, resident=tile.resident)
    output = torch.empty(
        batch, kv_heads, splits, rows, value_dim, dtype=torch.float32, device=query.device
    )
    lse = torch.empty(batch, kv_heads, splits, rows, dtype=torch.float32, device=query.device)
    lives, starts = (keys, keys) if cursor is None else (cursor.live, cursor.start)
    if query.stride(-1) != 1:
        query = query.contiguous()
    first, second = _parts(kept, masked=tile.masked)
    with torch.cuda.device_of(query):
        _attend[(splits, batch * kv_heads, blocks)](
            query, entries.order, keys, rest, values,
            lives, starts, output, lse,
            *query.stride()[:3], keys.stride(1), rest.stride(1), values.stride(1),
            kv_heads, queries, rows, entries.live[0] if cursor is None else cursor.most,
            entries.start[0] if cursor is None else cursor.block,
            rest.shape[2], scaling * LOG2E,
            HEAD_DIM=head_dim, KEPT=kept, HELD=min(kept, first), FIRST=first, SECOND=second,
            REST=max(16, triton.next_power_of_2(head_dim - kept)),
            VALUE_DIM=value_dim, VALUE=max(16, triton.next_power_of_2(value_dim)),
            ROWS=block, TOKENS=tile.tokens, RAGGED=cursor is not None, UPCAST=_upcast(query),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if splits == 1:
        merged, total = output[:, :, 0].to(dtype), lse[:, :, 0]
    else:
        merged, total = merge_splits(output, lse, dtype)
    return merged.view(batch, heads, queries, value_dim), total.reshape(batch, heads, queries)


@triton.jit
def _load(base, inside, d, DIM: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr):
    """Load [M, PADDED]; rows not ``inside`` (unless ``WHOLE``) and channels beyond are zero."""
    if WHOLE and DIM == PADDED:
        return tl.load(base)
    if WHOLE:
        return tl.load(base, mask=(d < DIM)[None, :], other=0.0)
    if DIM == PADDED:
        return tl.load(base, mask=inside[:, None], other=0.0)
    return tl.load(base, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _query_part(
    q, order, offset, inside,
    FROM: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load channels ``FROM … FROM + DIM`` of the storage order, [ROWS, PADDED]."""
    d = tl.arange(0, PADDED)
    channel = tl.load(order + FROM + d, mask=d < DIM, other=0)
    part = tl.load(
        q + offset[:, None] + channel[None, :],
        mask=inside[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    return part.to(tl.float32) if UPCAST else part


@triton.jit
def _walk(
    top, total, mean, q_first, q_second, q_rest, keys, rest, values, begin, end, live, start,
    ring, scale,
    KEPT: tl.constexpr, HELD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    DROPPED: tl.constexpr, REST: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE: tl.constexpr,
    TOKENS: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take tokens ``begin … end`` into the softmax; ``NARROW``: whole tiles of D' channels."""
    n = tl.arange(0, TOKENS)
    d_first, d_second = tl.arange(0, FIRST), tl.arange(0, SECOND if SECOND > 0 else 16)
    d_rest, d_value = tl.arange(0, REST), tl.arange(0, VALUE)
    at_first = n[:, None] * KEPT + d_first[None, :]
    at_second = n[:, None] * KEPT + (HELD + d_second)[None, :]
    at_value = n[:, None] * VALUE_DIM + d_value[None, :]
    for first in range(begin, end, TOKENS):
        token = first + n
        inside = token < live
        base = keys + tl.cast(first, tl.int64) * KEPT
        key = _load(base + at_first, inside, d_first, HELD, FIRST, NARROW)
        if UPCAST:
            key = key.to(tl.float32)
        logits = tl.dot(q_first, tl.trans(key), input_precision="tf32x3")
        if SECOND > 0:
            more = _load(base + at_second, inside, d_second, KEPT - HELD, SECOND, NARROW)
            if UPCAST:
                more = more.to(tl.float32)
            logits = tl.dot(q_second, tl.trans(more), logits, input_precision="tf32x3")
        if not NARROW:
            if DROPPED > 0:
                at_rest = (token % ring)[:, None] * DROPPED + d_rest[None, :]
                whole = inside & (token >= start)
                others = _load(rest + at_rest, whole, d_rest, DROPPED, REST, False)
                if UPCAST:
                    others = others.to(tl.float32)
                logits = tl.dot(q_rest, tl.trans(others), logits, input_precision="tf32x3")
            logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1) * scale)  # the scale is positive
        share = tl.exp2(logits * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(share, 1)
        at = values + tl.cast(first, tl.int64) * VALUE_DIM + at_value
        value = _load(at, inside, d_value, VALUE_DIM, VALUE, NARROW)
        if UPCAST:
            value = value.to(tl.float32)
        mean = mean * shrink[:, None]
        mean = tl.dot(share.to(value.dtype), value, mean, input_precision="tf32x3")
        top = higher
    return top, total, mean


@triton.jit(
    do_not_specialize=["live", "start", "queries", "rows"],
    do_not_specialize_on_alignment=["lives", "starts"],
)
def _attend(
    q, order, keys, rest, values, lives, starts, output, lse,
    q_batch, q_head, q_row, keys_head, rest_head, values_head,
    kv_heads, queries, rows, live, start, ring, scale,
    HEAD_DIM: tl.constexpr, KEPT: tl.constexpr,
    HELD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    REST: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, RAGGED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend over one split of one key/value head's tokens.

    Where the device knows what rows hold (RAGGED), ``live`` is the most whole tokens of a row and
    ``start`` how many become narrow at a time.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1).to(tl.int64)
    b, head = pair // kv_heads, pair % kv_heads
    if RAGGED:
        most, step = live, start
        live, start = tl.load(lives + b), tl.load(starts + b)
        start += tl.cdiv(tl.maximum(live - start - most, 0), step) * step
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = m < rows
    share = tl.cdiv(tl.cdiv(live, TOKENS), splits) * TOKENS
    begin = split * share
    end = tl.minimum(begin + share, live)
    target = (pair * splits + split) * rows + m
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, VALUE], tl.float32)
    if begin < end:
        group = rows // queries
        offset = b * q_batch + (head * group + m // queries).to(tl.int64) * q_head
        offset += (m % queries) * q_row
        order += pair * HEAD_DIM
        second: tl.constexpr = SECOND if SECOND > 0 else 16  # unused then
        q_first = _query_part(q, order, offset, inside, 0, HELD, FIRST, UPCAST)
        q_second = _query_part(q, order, offset, inside, HELD, KEPT - HELD, second, UPCAST)
        q_rest = _query_part(q, order, offset, inside, KEPT, HEAD_DIM - KEPT, REST, UPCAST)
        keys += pair * keys_head
        rest += pair * rest_head
        values += pair * values_head
        narrow = tl.minimum(start, end)
        middle = begin + tl.maximum(narrow - begin, 0) // TOKENS * TOKENS
        top, total, mean = _walk(
            top, total, mean, q_first, q_second, q_rest, keys, rest, values,
            begin, middle, live, start, ring, scale,
            KEPT, HELD, FIRST, SECOND, HEAD_DIM - KEPT, REST, VALUE_DIM, VALUE, TOKENS,
            True, UPCAST,
        )  # fmt: skip
        top, total, mean = _walk(
            top, total, mean, q_first, q_second, q_rest, keys, rest, values,
            middle, end, live, start, ring, scale,
            KEPT, HELD, FIRST, SECOND, HEAD_DIM - KEPT, REST, VALUE_DIM, VALUE, TOKENS,
            False, UPCAST,
        )  # fmt: skip
        d = tl.arange(0, VALUE)
        tl.store(
            output + target[:, None] * VALUE_DIM + d[None, :],
            mean / total[:, None],
            mask=inside[:, None] & (d < VALUE_DIM)[None, :],
        )
        level = (top + tl.log2(total)) * 0.6931471805599453
    else:
        level = top
    tl.store(lse + target, level, mask=inside)


def _parts(kept: int, *, masked: bool) -> tuple[int, int]:
    """Return the powers of two in which D' channels are loaded, the second 0 where one does."""
    if masked or kept < 16 or kept & (kept - 1) == 0:
        return max(16, triton.next_power_of_2(kept)), 0
    first = triton.next_power_of_2(kept) // 2
    return first, max(16, triton.next_power_of_2(kept - first))


def _default_tile(query: Tensor, block: int) -> Tile:
    """Return the tile for a step or for many queries, or a smaller one for large numbers."""
    if query.dtype == torch.float32 or query.shape[-1] > 128:
        return LARGE_TILE
    return STEP_TILE if block == 16 else MANY_TILE


def _upcast(states: Tensor) -> bool:
    """Say whether to multiply in float32: the interpreter's NumPy knows no bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1" and states.dtype == torch.bfloat16
