"""Quantise and pack in Triton: the same bytes as `quantise` and `writing` leave, in one pass.

Shapes: K key/value heads, D head_dim, Dk packed key channels, g group, P·n tokens of a block, n of
a plane, R residual.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (arguments and tuples are the compiler's, not Python's)
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(65504.0)
ROUND = tl.constexpr(1.5 * 2.0**23)
"""Adding and subtracting it rounds a small float32 half to even."""


@triton.jit
def _scales(low, high, sound, LEVELS: tl.constexpr):
    """Return scale and zero of groups as they are stored, float16, and NaN scales aside."""
    low, high = tl.where(sound, low, 0.0), tl.where(sound, high, 0.0)
    scale = tl.div_rn(high - low, low * 0.0 + LEVELS).to(tl.float16)
    zero = (low.to(tl.float16).to(tl.float32) + 0.0).to(tl.float16)
    return scale, zero


@triton.jit
def _codes(x, scale, zero, sound, LEVELS: tl.constexpr):
    """Return the codes of numbers under broadcast scales and zeros, int32."""
    step = scale.to(tl.float32)
    part = tl.div_rn(x - zero.to(tl.float32), tl.where(step > 0, step, 1.0) + x * 0.0)
    part = tl.minimum(tl.maximum(part, 0.0), LEVELS)
    code = ((part + ROUND) - ROUND).to(tl.int32)
    return tl.where((step > 0) & sound, code, 0)


@triton.jit(do_not_specialize=["row", "start", "windows"])
def pack_keys(
    source, channels, codes, scales, zeros, at_batch, at_head, at_row,
    row, start, kv_heads, windows,
    DK: tl.constexpr, DKP: tl.constexpr, NARROW: tl.constexpr, BITS: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pack one block of keys of one row and head.

    Args (beside strides and pointers):
        row: the cache's row of the grid's first. start: token of the source's first key.
    """
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    place = tl.program_id(0) * (16 // BITS * N)
    own = (row + batch).to(tl.int64) * kv_heads + head
    base = source + batch.to(tl.int64) * at_batch + head.to(tl.int64) * at_head
    base += place.to(tl.int64) * at_row
    _pack_block(
        base, channels, codes, scales, zeros, own, start + place, at_row, windows,
        DK, DKP, NARROW, BITS, G, R, N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["windows"], do_not_specialize_on_alignment=["lengths"])
def flush_keys(
    key_rest, channels, codes, scales, zeros, lengths, kv_heads, windows,
    D: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, NARROW: tl.constexpr,
    BITS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pack one block of the residual's keys if the row's last token completes a window."""
    pair, place = tl.program_id(1), tl.program_id(0) * (16 // BITS * N)
    length = tl.load(lengths + pair // kv_heads)
    if length % R == 0:
        own = pair.to(tl.int64)
        base = key_rest + (own * R + place) * D
        _pack_block(
            base, channels, codes, scales, zeros, own, length - R + place, D, windows,
            DK, DKP, NARROW, BITS, G, R, N,
        )  # fmt: skip


@triton.jit
def _pack_block(
    base, channels, codes, scales, zeros, own, first, at_row, windows,
    DK: tl.constexpr, DKP: tl.constexpr, NARROW: tl.constexpr, BITS: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pack the block of keys at ``base`` as tokens ``first …`` of one row and head."""
    PLANES: tl.constexpr = 16 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    BLOCK: tl.constexpr = PLANES * N
    d, i = tl.arange(0, DKP), tl.arange(0, N)
    column = d
    if NARROW:
        column = tl.load(channels + own * DK + d, mask=d < DK, other=0)
    inside = (d < DK)[None, :]
    words = tl.zeros([N, DKP], tl.int32)
    GROUPS: tl.constexpr = BLOCK // G
    EACH: tl.constexpr = PLANES // GROUPS
    for k in tl.static_range(GROUPS):
        planes = ()
        for e in tl.static_range(EACH):
            row = ((k * EACH + e) * N + i)[:, None] * at_row
            x = tl.load(base + row + column[None, :], mask=inside, other=0.0)
            planes = planes + (x.to(tl.float32),)
        low, high = tl.min(planes[0], 0), tl.max(planes[0], 0)
        bad = tl.max(tl.where(tl.abs(planes[0]) <= LARGEST, 0, 1), 0)
        for e in tl.static_range(1, EACH):
            low = tl.minimum(low, tl.min(planes[e], 0))
            high = tl.maximum(high, tl.max(planes[e], 0))
            bad = tl.maximum(bad, tl.max(tl.where(tl.abs(planes[e]) <= LARGEST, 0, 1), 0))
        sound = bad == 0
        scale, zero = _scales(low, high, sound, LEVELS)
        for e in tl.static_range(EACH):
            code = _codes(planes[e], scale[None, :], zero[None, :], sound[None, :], LEVELS)
            words |= code << (BITS * (k * EACH + e))
        at = own * windows * (R // G * DK) + (first // G + k).to(tl.int64) * DK + d
        tl.store(scales + at, tl.where(sound, scale, float("nan")), mask=d < DK)
        tl.store(zeros + at, zero, mask=d < DK)
    at = own * windows * (R // PLANES * DK) + (first // BLOCK).to(tl.int64) * (N * DK)
    tl.store(codes + at + i[:, None] * DK + d[None, :], words.to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["row", "start", "end", "blocks"])
def pack_values(
    source, codes, scales, zeros, at_batch, at_head, at_row, row, start, end, kv_heads, blocks,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Pack the values of one block of one row and head, beside those that are there.

    Args (beside strides and pointers):
        row: the cache's row of the grid's first. start, end: tokens that the source holds.
    """
    PLANES: tl.constexpr = 16 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    BLOCK: tl.constexpr = PLANES * N
    GROUPS: tl.constexpr = D // G
    SPACE: tl.constexpr = DP // G
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    block = start // BLOCK + tl.program_id(0)
    own = (row + batch).to(tl.int64) * kv_heads + head
    base = source + batch.to(tl.int64) * at_batch + head.to(tl.int64) * at_head
    d, i, k = tl.arange(0, DP), tl.arange(0, N), tl.arange(0, SPACE)
    words = tl.zeros([N, DP], tl.int32)
    side = own * blocks * (BLOCK * GROUPS) + block.to(tl.int64) * (BLOCK * GROUPS)
    for j in tl.static_range(PLANES):
        token = block * BLOCK + j * N + i
        taken = (token >= start) & (token < end)
        x = tl.load(
            base + (token - start).to(tl.int64)[:, None] * at_row + d[None, :],
            mask=taken[:, None] & (d < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        x = tl.reshape(x, [N, SPACE, G])
        sound = tl.max(tl.where(tl.abs(x) <= LARGEST, 0, 1), 2) == 0
        scale, zero = _scales(tl.min(x, 2), tl.max(x, 2), sound, LEVELS)
        code = _codes(x, scale[:, :, None], zero[:, :, None], sound[:, :, None], LEVELS)
        words |= tl.reshape(code, [N, DP]) << (BITS * j)
        at = side + k[None, :] * BLOCK + (j * N + i)[:, None]
        mask = taken[:, None] & (k < GROUPS)[None, :]
        tl.store(scales + at, tl.where(sound, scale, float("nan")), mask=mask)
        tl.store(zeros + at, zero, mask=mask)
    at = own * blocks * (N * D) + block.to(tl.int64) * (N * D)
    at += i[:, None] * D + d[None, :]
    mask = (i >= 0)[:, None] & (d < D)[None, :]
    old = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
    tl.store(codes + at, (words | old).to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["blocks", "rest"], do_not_specialize_on_alignment=["lengths"])
def append_token(
    key, value, key_rest, value_rest, codes, scales, zeros, lengths,
    k_batch, k_head, v_batch, v_head, kv_heads, blocks, rest,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BITS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Put one row's newest token into the residual and pack the value that it displaces."""
    PLANES: tl.constexpr = 16 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    BLOCK: tl.constexpr = PLANES * N
    GROUPS: tl.constexpr = DV // G
    SPACE: tl.constexpr = DVP // G
    pair = tl.program_id(0)
    batch, head = pair // kv_heads, pair % kv_heads
    length = tl.load(lengths + batch)
    slot = length % R
    own = pair.to(tl.int64)
    dk, d, k = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, SPACE)
    spot = value_rest + (own * rest + slot) * DV + d
    if length >= R:
        token = length - R
        block, offset = token // BLOCK, token % BLOCK
        x = tl.load(spot, mask=d < DV, other=0.0).to(tl.float32)
        x = tl.reshape(x, [SPACE, G])
        sound = tl.max(tl.where(tl.abs(x) <= LARGEST, 0, 1), 1) == 0
        scale, zero = _scales(tl.min(x, 1), tl.max(x, 1), sound, LEVELS)
        code = _codes(x, scale[:, None], zero[:, None], sound[:, None], LEVELS)
        code = tl.reshape(code, [DVP]) << (BITS * (offset // N))
        at = codes + (own * blocks + block) * (N * DV) + (offset % N) * DV + d
        old = tl.load(at, mask=d < DV, other=0).to(tl.int32)
        tl.store(at, (code | old).to(tl.int16), mask=d < DV)
        side = (own * blocks + block) * (BLOCK * GROUPS) + k * BLOCK + offset
        tl.store(scales + side, tl.where(sound, scale, float("nan")), mask=k < GROUPS)
        tl.store(zeros + side, zero, mask=k < GROUPS)
        tl.debug_barrier()  # the old value was read before the new one takes its place
    new = tl.load(value + batch.to(tl.int64) * v_batch + head * v_head + d, mask=d < DV)
    tl.store(spot, new, mask=d < DV)
    new = tl.load(key + batch.to(tl.int64) * k_batch + head * k_head + dk, mask=dk < D)
    tl.store(key_rest + (own * rest + slot) * D + dk, new, mask=dk < D)
