"""How published block-sparse prefill kernels work, for comparison: every tile is masked.

Written here from the descriptions of such kernels: lists in ascending order, causality and bounds
tested in every tile, queries scaled beforehand, fixed tiles. It stands in for those kernels and is
none of them.
"""

# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, BlockLists


def published_design(
    query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, scaling: float, keys: int
) -> Tensor:
    """Attend over listed blocks, [1, H, T, D] → [1, T, H, D], in tiles of 128 × ``keys``."""
    _, heads, length, d = query.shape
    grid = BlockGrid(length, length, lists.block)
    output = torch.empty(1, length, heads, d, dtype=query.dtype, device=query.device)
    _masked_everywhere[(grid.rows, heads)](
        query, key, value, output, lists.count, lists.index,
        *query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3],
        heads, length, lists.index.shape[-1], scaling * math.log2(math.e),
        GROUP=heads // key.shape[1], D=d, BLOCK=lists.block, KEYS=keys,
        num_warps=8, num_stages=3 if keys == 64 else 2,
    )  # fmt: skip
    return output


@triton.jit
def _masked_everywhere(
    q, k, v, out, count, index, q_head, q_row, k_head, k_row, v_head, v_row,
    heads, length, width, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // GROUP
    m = row * BLOCK + tl.arange(0, BLOCK)
    n, d = tl.arange(0, KEYS), tl.arange(0, D)
    q_offset = m.to(tl.int64)[:, None] * q_row + d[None, :]
    query = tl.load(q + head.to(tl.int64) * q_head + q_offset, mask=(m < length)[:, None])
    query = (query * scale).to(q.dtype.element_ty)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    states = tl.zeros([BLOCK, D], tl.float32)
    entries = (head.to(tl.int64) * tl.num_programs(0) + row) * width
    listed = tl.load(count + head * tl.num_programs(0) + row)
    for entry in range(listed):
        block = tl.load(index + entries + entry)
        for part in range(BLOCK // KEYS):
            column = block * BLOCK + part * KEYS + n
            inside = (column < length)[:, None]
            offset = column.to(tl.int64)[:, None]
            key = tl.load(k + kv_head * k_head + offset * k_row + d[None, :], mask=inside, other=0)
            value = tl.load(
                v + kv_head * v_head + offset * v_row + d[None, :], mask=inside, other=0
            )
            seen = (column[None, :] <= m[:, None]) & (column < length)[None, :]
            scores = tl.where(seen, tl.dot(query, tl.trans(key)), -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            share = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(share, 1)
            states = tl.dot(share.to(value.dtype), value, states * fade[:, None])
            top = higher
    states = states / total[:, None]
    out_offset = m.to(tl.int64)[:, None] * heads * D + head * D + d[None, :]
    tl.store(out + out_offset, states.to(out.dtype.element_ty), mask=(m < length)[:, None])
