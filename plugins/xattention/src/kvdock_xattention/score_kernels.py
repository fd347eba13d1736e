"""Antidiagonal scores in Triton: a causal product whose inner dimension is S·D, never stored.

Every program multiplies a group of query tiles by a group of key tiles, takes exponentials while
the product is in registers, and writes one number per (query tile, key block): the base-2 logarithm
of the block's sum. The softmax over all blocks follows in `choice_kernels`.

Shapes: b rows, H query heads, K key/value heads, G = H/K, Q queries, N keys, D head_dim, S stride,
Nk key blocks. A pair is a row of the batch and one of its key/value heads.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = (
    "kv_heads", "pair", "origin", "low", "high", "first", "lead", "q_length", "k_length", "tiles",
    "key_tiles", "blocks", "part_tiles", "width", "items",
)  # fmt: skip
"""What changes from prompt to prompt: a kernel is not compiled again for it."""


@triton.jit
def _reach(group, first, key_tiles, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Return how many groups of keys precede the end of query group ``group``."""
    return tl.cdiv(tl.minimum(first + (group + 1) * QUERIES, key_tiles), KEYS)


@triton.jit
def _locate(
    item, low, high, first, key_tiles, width,
    GROUP: tl.constexpr, BAND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return (head in the group, query group, key group, whether there is such an item).

    A long and a short band of query groups share a strip of the same width, so that items are
    counted without a table: the triangle is folded into a rectangle.
    """
    inner = item % (BAND * GROUP)
    column = item // (BAND * GROUP) % width
    near = item // (BAND * GROUP) // width
    far = tl.cdiv(high - low, BAND) - 1 - near
    wide = _reach(tl.minimum(low + far * BAND + BAND, high) - 1, first, key_tiles, QUERIES, KEYS)
    is_far = column < wide
    band = tl.where(is_far, far, near)
    group = low + band * BAND + inner // GROUP
    column = tl.where(is_far, column, column - wide)
    exists = (group < high) & (is_far | (near < far))
    exists = exists & (column < _reach(group, first, key_tiles, QUERIES, KEYS))
    return inner % GROUP, group, column, exists


@triton.jit
def _described_product(
    q, k, batch, head, kv_head, group, column, lead,
    S: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Return A [QUERIES, KEYS] from descriptors of whole tiles; see `_product`."""
    PARTS: tl.constexpr = HEAD_DIM // INNER
    q_first = group * QUERIES - (lead + S - 1) // S  # the descriptor starts at a whole tile
    k_first = column * KEYS
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for step in range(S * PARTS):
        i, d = step // PARTS, step % PARTS * INNER
        query = q.load([batch, head, S - 1 - i, q_first, d])
        key = k.load([batch, kv_head, i, k_first, d])
        query, key = query.reshape(QUERIES, INNER), key.reshape(KEYS, INNER)
        total = tl.dot(query, key.T, total)
    return total


@triton.jit
def _product(
    q, k, q_row, k_row, group, column, lead, q_length, k_length,
    S: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return A [QUERIES, KEYS]: sums over the antidiagonals of S×S tiles, float32."""
    PARTS: tl.constexpr = HEAD_DIM // INNER
    m, n, c = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, INNER)
    q_first = group * (QUERIES * S) + (S - 1) - lead
    k_first = column * (KEYS * S)
    q_token, k_token = q_first + m * S, k_first + n * S
    q_base = q + tl.cast(q_first, tl.int64) * q_row
    k_base = k + tl.cast(k_first, tl.int64) * k_row
    q_offset = m[:, None] * (S * q_row) + c[None, :]
    k_offset = n[:, None] * (S * k_row) + c[None, :]
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for step in range(S * PARTS):
        i, d = step // PARTS, step % PARTS * INNER
        inside = (q_token >= i) & (q_token < q_length + i)
        query = tl.load(q_base - i * q_row + d + q_offset, mask=inside[:, None], other=0.0)
        inside = k_token < k_length - i
        key = tl.load(k_base + i * k_row + d + k_offset, mask=inside[:, None], other=0.0)
        if UPCAST:
            query, key = query.to(tl.float32), key.to(tl.float32)
        total = tl.dot(query, key.T, total, input_precision="tf32x3")
    return total


@triton.jit
def _keep(
    total, level, level_row, group, column, origin, first, tiles, blocks, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write log2 of the block sums of exp2(A · scale) to ``level``, [tiles of the part, Nk]."""
    m = group * QUERIES + tl.arange(0, QUERIES)
    if column * KEYS + KEYS > first + group * QUERIES + 1:
        n = column * KEYS + tl.arange(0, KEYS)
        total = tl.where(n[None, :] <= first + m[:, None], total, float("-inf"))
    top = tl.max(total, 1)
    top = tl.where(top == float("-inf"), 0.0, top) * scale
    share = tl.exp2(total * scale - top[:, None])
    sums = tl.sum(tl.reshape(share, [QUERIES, KEYS // PER_BLOCK, PER_BLOCK]), 2)
    block = column * (KEYS // PER_BLOCK) + tl.arange(0, KEYS // PER_BLOCK)
    row = tl.cast(m - origin * QUERIES, tl.int64)
    place = level + row[:, None] * level_row + block[None, :]
    tl.store(
        place, top[:, None] + tl.log2(sums), mask=(m < tiles)[:, None] & (block < blocks)[None, :]
    )


@triton.jit(do_not_specialize=COUNTS)
def score_items(
    q, k, level, level_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    kv_heads, pair, origin, low, high, first, lead, q_length, k_length, tiles, key_tiles, blocks,
    part_tiles, width, items, scale,
    GROUP: tl.constexpr, BAND: tl.constexpr, S: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, INNER: tl.constexpr, PER_BLOCK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one item: QUERIES × KEYS tiles of one head."""
    item, local = tl.program_id(0) % items, tl.program_id(0) // items
    batch, kv_head = (pair + local) // kv_heads, (pair + local) % kv_heads
    inner, group, column, exists = _locate(
        item, low, high, first, key_tiles, width, GROUP, BAND, QUERIES, KEYS
    )
    if exists:
        head = kv_head * GROUP + inner
        if DESCRIPTORS:
            total = _described_product(
                q, k, batch, head, kv_head, group, column, lead, S, HEAD_DIM, QUERIES, KEYS, INNER
            )
        else:
            q += tl.cast(batch, tl.int64) * q_batch + tl.cast(head, tl.int64) * q_head
            k += tl.cast(batch, tl.int64) * k_batch + tl.cast(kv_head, tl.int64) * k_head
            total = _product(
                q, k, q_row, k_row, group, column, lead, q_length, k_length,
                S, HEAD_DIM, QUERIES, KEYS, INNER, UPCAST,
            )  # fmt: skip
        level += tl.cast(local * GROUP + inner, tl.int64) * part_tiles * level_row
        _keep(
            total, level, level_row, group, column, origin, first, tiles, blocks, scale,
            QUERIES, KEYS, PER_BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=(*COUNTS, "all_items"))
def score_walking(
    q, k, level, level_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    kv_heads, pair, origin, low, high, first, lead, q_length, k_length, tiles, key_tiles, blocks,
    part_tiles, width, items, all_items, scale,
    GROUP: tl.constexpr, BAND: tl.constexpr, S: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, INNER: tl.constexpr, PER_BLOCK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute every ``programs``-th item, so that an item's first loads precede the last's end."""
    start, programs = tl.program_id(0), tl.num_programs(0)
    for number in range(start, all_items, programs):
        item, local = number % items, number // items
        batch, kv_head = (pair + local) // kv_heads, (pair + local) % kv_heads
        inner, group, column, exists = _locate(
            item, low, high, first, key_tiles, width, GROUP, BAND, QUERIES, KEYS
        )
        head = kv_head * GROUP + inner
        if DESCRIPTORS:
            total = _described_product(
                q, k, batch, head, kv_head, group, column, lead, S, HEAD_DIM, QUERIES, KEYS, INNER
            )
        else:
            q_here = q + tl.cast(batch, tl.int64) * q_batch + tl.cast(head, tl.int64) * q_head
            k_here = k + tl.cast(batch, tl.int64) * k_batch + tl.cast(kv_head, tl.int64) * k_head
            total = _product(
                q_here, k_here, q_row, k_row, group, column, lead, q_length, k_length,
                S, HEAD_DIM, QUERIES, KEYS, INNER, UPCAST,
            )  # fmt: skip
        here = level + tl.cast(local * GROUP + inner, tl.int64) * part_tiles * level_row
        _keep(
            total, here, level_row, group, column, origin, first,
            tl.where(exists, tiles, 0), blocks, scale, QUERIES, KEYS, PER_BLOCK,
        )  # fmt: skip
