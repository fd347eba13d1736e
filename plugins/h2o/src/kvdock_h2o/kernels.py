"""Column sums of causal attention in Triton: one pass over the scores, nothing of size T×T.

Logits and log-sum-exps are in base 2 here, so that exp2 takes them as they are. Queries attend to
all keys up to their own; query r of Q stands at position N − Q + r.

Shapes: b rows, H query heads, K key/value heads, G = H/K, Q queries, N keys, D head_dim.
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
from triton.tools.tensor_descriptor import TensorDescriptor

LARGEST_HEAD = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tile:
    """Say how one program is cut: keys and queries per tile, warps, depth of the pipeline.

    ``registers`` caps those of a thread, so that two programs share a multiprocessor and one
    multiplies while the other takes exponentials. ``copies``: queries come by the copy unit of new
    GPUs, where their layout allows it, which spares registers and instructions.
    """

    keys: int
    queries: int
    warps: int
    stages: int
    registers: int | None = None
    copies: bool = False


SUM_TILE = Tile(keys=128, queries=64, warps=4, stages=3, copies=True)
LSE_TILE = Tile(keys=128, queries=128, warps=8, stages=2, registers=128)


def serves(queries: Tensor) -> bool:
    """Say whether the kernels take this data type and head_dim."""
    return queries.shape[-1] <= LARGEST_HEAD.get(queries.dtype, 0)


def column_sums(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    lse: Tensor | None = None,
    *,
    tile: Tile | None = None,
    lse_tile: Tile | None = None,
) -> Tensor:
    """Sum the probabilities every key receives over all queries and over its group.

    Every program owns a block of keys and walks over the queries that see it, so that each sum is
    written once and in a fixed order: no atomics, the same bits every time.

    Args:
        queries: [b, H, Q, D]. keys: [b, K, N, D], N ≥ Q.
        lse: natural log-sum-exp of the scaled scores, float32 [b, H, Q]; computed when None.

    Returns:
        float32 [b, K, N].
    """
    queries, keys = _rows_contiguous(queries), _rows_contiguous(keys)
    b, h, q, d = queries.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    sums = torch.zeros(b, kv_heads, n, dtype=torch.float32, device=keys.device)
    if q == 0:
        return sums
    if lse is None:
        level = log2_sum_exp2(queries, keys, scaling, tile=lse_tile)
    else:
        level = lse.float().contiguous() * LOG2E
    tile = tile or _default_tile(queries, SUM_TILE)
    grid = (triton.cdiv(n, tile.keys), b * kv_heads)
    copied = _described(queries, tile) if tile.copies else None
    with torch.cuda.device_of(queries):
        _sum_columns[grid](
            queries, queries if copied is None else copied, keys, level, sums,
            *queries.stride()[:3], *keys.stride()[:3],
            kv_heads, q, n, scaling * LOG2E,
            GROUP=h // kv_heads, HEAD_DIM=d, PADDED=max(16, triton.next_power_of_2(d)),
            KEYS=tile.keys, QUERIES=tile.queries,
            UPCAST=_upcast(queries), COPIES=copied is not None,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return sums


def log2_sum_exp2(
    queries: Tensor, keys: Tensor, scaling: float, *, tile: Tile | None = None
) -> Tensor:
    """Return the base-2 log-sum-exp of every query's scores, float32 [b, H, Q]."""
    queries, keys = _rows_contiguous(queries), _rows_contiguous(keys)
    b, h, q, d = queries.shape
    tile = tile or _default_tile(queries, LSE_TILE)
    level = torch.empty(b, h, q, dtype=torch.float32, device=queries.device)
    grid = (triton.cdiv(q, tile.queries), b * h)
    with torch.cuda.device_of(queries):
        _log_sums[grid](
            queries, keys, level,
            *queries.stride()[:3], *keys.stride()[:3],
            h, q, keys.shape[2], scaling * LOG2E,
            GROUP=h // keys.shape[1], HEAD_DIM=d, PADDED=max(16, triton.next_power_of_2(d)),
            KEYS=tile.keys, QUERIES=tile.queries, UPCAST=_upcast(queries),
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return level


@triton.jit
def _tile(
    base, offset, inside, d,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load rows [M, PADDED]; rows not ``inside`` (unless ``WHOLE``) and added channels are zero."""
    if WHOLE and HEAD_DIM == PADDED:
        return tl.load(base + offset)
    if WHOLE:
        return tl.load(base + offset, mask=(d < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == PADDED:
        return tl.load(base + offset, mask=inside[:, None], other=0.0)
    return tl.load(base + offset, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _sum_rows(
    total, key, n, m, d, query_base, level_base, q_row, past, q_length, scale, begin, end,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, COPIES: tl.constexpr, copied, copied_row, column,
):  # fmt: skip
    """Add the probabilities that queries ``begin … end`` of one head give to a block of keys.

    The total is [QUERIES, KEYS] and summed over its rows at the very end: no exchange between
    threads on the way. ``WHOLE``: all of the queries exist and see all of the keys.
    """
    offset = m[:, None] * q_row + d[None, :]
    for first in range(begin, end, QUERIES):
        row = first + m
        inside = row < q_length
        base = query_base + tl.cast(first, tl.int64) * q_row
        if COPIES and WHOLE:
            query = copied.load([copied_row + first, column])
        else:
            query = _tile(base, offset, inside, d, HEAD_DIM, PADDED, WHOLE)
        if UPCAST:
            query = query.to(tl.float32)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if WHOLE:
            share = logits * scale - tl.load((level_base + first) + m)[:, None]
        else:  # a query beyond the last one gets the level +inf and so the probability zero
            level = tl.load((level_base + first) + m, mask=inside, other=float("inf"))
            share = logits * scale - level[:, None]
            share = tl.where(past + row[:, None] >= n[None, :], share, float("-inf"))
        total += tl.exp2(share)
    return total


@triton.jit
def _sum_columns(
    q, copied, k, level, sums,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    kv_heads, q_length, k_length, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, UPCAST: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Sum the probabilities of one block of keys; blocks seen by most queries start first."""
    start = tl.program_id(0) * KEYS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    n, m, d = start + tl.arange(0, KEYS), tl.arange(0, QUERIES), tl.arange(0, PADDED)
    offset = n.to(tl.int64)[:, None] * k_row + d[None, :]
    key_base = k + batch * k_batch + head * k_head
    key = _tile(key_base, offset, n < k_length, d, HEAD_DIM, PADDED, False)
    if UPCAST:
        key = key.to(tl.float32)
    past = k_length - q_length
    begin = tl.maximum(start - past, 0)
    # queries before the block's last key do not see all of it
    partly = tl.minimum(tl.maximum(start + KEYS - 1 - past, 0), q_length) - begin
    middle = begin + tl.cdiv(partly, QUERIES) * QUERIES
    rest = middle + tl.maximum(q_length - middle, 0) // QUERIES * QUERIES
    copied_row = (batch * q_length).to(tl.int32)
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for g in range(GROUP):
        query_head = (head * GROUP + g).to(tl.int32)
        query_base = q + batch * q_batch + (head * GROUP + g) * q_head
        level_base = level + (pair * GROUP + g) * q_length
        total = _sum_rows(
            total, key, n, m, d, query_base, level_base, q_row, past, q_length, scale,
            begin, middle, HEAD_DIM, PADDED, QUERIES, False, UPCAST, COPIES,
            copied, copied_row, query_head * HEAD_DIM,
        )  # fmt: skip
        total = _sum_rows(
            total, key, n, m, d, query_base, level_base, q_row, past, q_length, scale,
            middle, rest, HEAD_DIM, PADDED, QUERIES, True, UPCAST, COPIES,
            copied, copied_row, query_head * HEAD_DIM,
        )  # fmt: skip
        total = _sum_rows(
            total, key, n, m, d, query_base, level_base, q_row, past, q_length, scale,
            rest, q_length, HEAD_DIM, PADDED, QUERIES, False, UPCAST, COPIES,
            copied, copied_row, query_head * HEAD_DIM,
        )  # fmt: skip
    tl.store(sums + pair * k_length + n, tl.sum(total, 0), mask=n < k_length)


@triton.jit
def _walk_keys(
    top, total, query, position, k_base, k_row, n, d, k_length, scale, begin, end,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take keys ``begin … end`` into the running maxima and sums of a block of queries."""
    offset = n[:, None] * k_row + d[None, :]
    for first in range(begin, end, KEYS):
        column = first + n
        base = k_base + tl.cast(first, tl.int64) * k_row
        key = _tile(base, offset, column < k_length, d, HEAD_DIM, PADDED, not MASKED)
        if UPCAST:
            key = key.to(tl.float32)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if MASKED:
            logits = tl.where(column[None, :] <= position[:, None], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1) * scale)  # the scale is positive
        share = tl.exp2(logits * scale - higher[:, None])
        total = total * tl.exp2(top - higher) + tl.sum(share, 1)
        top = higher
    return top, total


@triton.jit
def _log_sums(
    q, k, level,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    heads, q_length, k_length, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the base-2 log-sum-exps of one block of queries; the last block, the longest, first."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    m, n, d = start + tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, PADDED)
    offset = m.to(tl.int64)[:, None] * q_row + d[None, :]
    query_base = q + batch * q_batch + head * q_head
    query = _tile(query_base, offset, m < q_length, d, HEAD_DIM, PADDED, False)
    if UPCAST:
        query = query.to(tl.float32)
    k_base = k + batch * k_batch + (head // GROUP) * k_head
    past = k_length - q_length
    middle = (past + start + 1) // KEYS * KEYS  # keys that all of the block's queries see
    end = tl.minimum(past + start + QUERIES, k_length)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    zero = middle * 0
    top, total = _walk_keys(
        top, total, query, past + m, k_base, k_row, n, d, k_length, scale, zero, middle,
        HEAD_DIM, PADDED, KEYS, False, UPCAST,
    )  # fmt: skip
    top, total = _walk_keys(
        top, total, query, past + m, k_base, k_row, n, d, k_length, scale, middle, end,
        HEAD_DIM, PADDED, KEYS, True, UPCAST,
    )  # fmt: skip
    tl.store(level + pair * q_length + m, top + tl.log2(total), mask=m < q_length)


def _default_tile(queries: Tensor, usual: Tile) -> Tile:
    """Return the usual tile, or a smaller one where the data type or the head is larger."""
    if queries.dtype == torch.float32 or queries.shape[-1] > 128:
        return Tile(keys=64, queries=32, warps=4, stages=2)
    return usual


def _described(queries: Tensor, tile: Tile) -> TensorDescriptor | None:
    """Describe queries that lie as a model leaves them, [b·Q, H·D], to the copy unit."""
    b, h, q, d = queries.shape
    rows = queries.transpose(1, 2)
    if not rows.is_contiguous() or d not in (64, 128) or queries.element_size() != 2:
        return None
    if queries.is_cuda and torch.cuda.get_device_capability(queries.device) < (9, 0):
        return None
    flat = rows.view(b * q, h * d)
    return TensorDescriptor.from_tensor(flat, [tile.queries, d])


def _rows_contiguous(states: Tensor) -> Tensor:
    """Return states whose last dimension is contiguous, as the kernels' addresses assume."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _upcast(states: Tensor) -> bool:
    """Say whether to multiply in float32: the interpreter's NumPy knows no bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1" and states.dtype == torch.bfloat16
