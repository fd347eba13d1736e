"""Attention over a packed cache in Triton: codes are read as they lie, never unpacked to memory.

A code stays where it lies in its word and is read as the bits of a float16: code c at bit k is the
subnormal c·2^(k−24), exactly. One mask therefore turns two codes into two factors of a product, and
the power of two comes out of the float32 result. Key scales go into the queries, value scales into
the probabilities: q·(s⊙c + z) = (q⊙s)·c + q·z and Σ p(s·c + z) = (p⊙s)·c + p·z.

A tensor core multiplies 16 rows at least and a group of query heads is smaller, so every query row
is repeated for every group of value channels (``REPEAT``): a copy weighs the codes of all channels
with the scales of its own group, and writes the channels of that group only.

Shapes: M rows of a program, D head_dim, Dk packed key channels, P planes, n tokens of a plane.
Split 0 holds the newest tokens, as the model made them; the others share the packed ones.
"""

# ruff: noqa: ANN001, ANN201, RUF005  (arguments and tuples are the compiler's, not Python's)
# mypy: disable-error-code=assignment

from __future__ import annotations

import math

import triton
import triton.language as tl

from kvdock_kivi.tile_kernels import block_logits, finite, power, value_tile

LN2 = tl.constexpr(math.log(2))


@triton.jit(
    do_not_specialize=[
        "kv_heads", "queries", "count", "splits", "key_windows", "value_blocks", "rest", "held",
    ],
    do_not_specialize_on_alignment=["lengths"],
)  # fmt: skip
def packed_attention(
    q_full, q_packed, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero,
    key_rest, value_rest, rows, lengths, out, lse,
    q_batch, q_head, q_row, p_batch, p_head, p_row, kv_heads, queries, count, splits,
    key_windows, value_blocks, rest, scale, held,
    D: tl.constexpr, DP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, REPEAT: tl.constexpr,
    BITS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, FINE: tl.constexpr, INTERPRET: tl.constexpr, UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend over one split of one row and key/value head.

    Args (beside strides and pointers):
        rows: the cache's row for every row of the grid. count: query rows of a key/value head.
        held: newest tokens whose key window is not packed even if it is full.
        scale: of the logits, times log2(e).
        FINE: keep queries times key scales to twice a half's precision.
    """
    PLANES: tl.constexpr = 16 // BITS
    TILE: tl.constexpr = ROWS * PLANES
    split, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    line = tl.load(rows + batch)
    length = tl.load(lengths + line)
    own = tl.cast(line, tl.int64) * kv_heads + head
    keys_end = tl.maximum(length - held, 0) // R * R
    values_end = tl.maximum(length - R, 0)
    copy = tl.program_id(2) * M + tl.arange(0, M)
    m, kind = copy // REPEAT, copy % REPEAT
    real = m < count
    query_head, query = head * (count // queries) + m // queries, m % queries
    d, r, dv = tl.arange(0, DKP), tl.arange(0, ROWS), tl.arange(0, DVP)
    column = tl.arange(0, COLUMNS)
    at = q_packed + tl.cast(batch, tl.int64) * p_batch
    at += query_head.to(tl.int64) * p_head + query.to(tl.int64) * p_row
    q = tl.load(at[:, None] + d[None, :], mask=real[:, None] & (d < DK)[None, :], other=0.0)
    q = q.to(tl.float16)
    codes_at = key_codes + own * key_windows * (R // PLANES * DK)
    scale_at = key_scale + own * key_windows * (R // G * DK)
    zero_at = key_zero + own * key_windows * (R // G * DK)
    key_blocks = key_windows * (R // (PLANES * N))
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    token_of = (r // N) * (N * PLANES) + r % N  # of a row of words, plane 0
    if split == 0:
        from_q = q_full + tl.cast(batch, tl.int64) * q_batch
        from_q += query_head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
        dq, w = tl.arange(0, DP), tl.arange(0, 32)
        whole = tl.load(
            from_q[:, None] + dq[None, :], mask=real[:, None] & (dq < D)[None, :], other=0.0
        )
        if UPCAST:
            whole = whole.to(tl.float32)
        keys_at, values_at = key_rest + own * rest * D, value_rest + own * rest * DV
        for block in tl.range(values_end // TILE, tl.cdiv(keys_end, TILE), num_stages=1):
            logits = block_logits(
                q, codes_at, scale_at, zero_at, block, d, r, scale, key_blocks,
                DK, DKP, N, ROWS, G, BITS, FINE, INTERPRET,
            )  # fmt: skip
            for j in tl.static_range(PLANES):
                token = block * TILE + token_of + j * N
                seen = (token >= values_end) & (token < keys_end)
                part = tl.where(seen[None, :], logits[j], float("-inf"))
                value = tl.load(
                    values_at + (token % R)[:, None] * DV + dv[None, :],
                    mask=seen[:, None] & (dv < DV)[None, :], other=0.0,
                )  # fmt: skip
                if UPCAST:
                    value = value.to(tl.float32)
                higher = tl.maximum(top, tl.max(part, 1))
                level = finite(higher)
                p = tl.exp2(part - level[:, None])
                fade = tl.exp2(top - level)
                mass = mass * fade + tl.sum(p, 1)
                acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None])
                top = higher
        for start in tl.range(tl.maximum(keys_end, values_end), length, 32, num_stages=1):
            slot, seen = (start + w) % R, start + w < length
            key = tl.load(
                keys_at + slot[None, :] * D + dq[:, None],
                mask=seen[None, :] & (dq < D)[:, None], other=0.0,
            )  # fmt: skip
            value = tl.load(
                values_at + slot[:, None] * DV + dv[None, :],
                mask=seen[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
            if UPCAST:
                key, value = key.to(tl.float32), value.to(tl.float32)
            part = tl.where(seen[None, :], tl.dot(whole, key) * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(part, 1))
            level = finite(higher)
            p = tl.exp2(part - level[:, None])
            fade = tl.exp2(top - level)
            mass = mass * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None])
            top = higher
    else:
        GROUPS: tl.constexpr = DV // G
        from_codes = value_codes + own * value_blocks * (N * DV)
        from_codes += r[:, None] * DV + dv[None, :]
        # scales of a block: [channel group][token]
        side = (r // N) * (N * PLANES * GROUPS) + r % N
        from_scale = value_scale + own * value_blocks * (N * PLANES * GROUPS)
        from_scale += kind[:, None] * (N * PLANES) + side[None, :]
        from_zero = value_zero + own * value_blocks * (N * PLANES * GROUPS)
        from_zero += column[None, :] * (N * PLANES) + side[:, None]
        tiles = tl.cdiv(values_end, TILE)
        each = tl.cdiv(tiles, splits)
        begin = (split - 1) * each
        end = tl.minimum(begin + each, tiles)
        whole_end = tl.minimum(end, values_end // TILE)
        extra = ()
        for _ in tl.static_range(8 // BITS):
            extra = extra + (tl.zeros([M, COLUMNS], tl.float32),)
        for tile in tl.range(begin, whole_end, num_stages=STAGES):
            acc, extra, top = value_tile(
                q, codes_at, scale_at, zero_at, from_codes, from_scale, from_zero,
                acc, extra, top, tile, d, r, dv, column, token_of, values_end, scale,
                key_blocks, value_blocks,
                DK, DKP, DV, DVP, N, ROWS, G, M, GROUPS, BITS, FINE, False, INTERPRET,
            )  # fmt: skip
        for tile in tl.range(tl.maximum(begin, whole_end), end, num_stages=1):
            acc, extra, top = value_tile(
                q, codes_at, scale_at, zero_at, from_codes, from_scale, from_zero,
                acc, extra, top, tile, d, r, dv, column, token_of, values_end, scale,
                key_blocks, value_blocks,
                DK, DKP, DV, DVP, N, ROWS, G, M, GROUPS, BITS, FINE, True, INTERPRET,
            )  # fmt: skip
        sides = tl.zeros([M, COLUMNS], tl.float32)
        for place in tl.static_range(8 // BITS):
            sides += extra[place] * power(BITS * place - 3)
        mass = tl.sum(tl.where(column[None, :] == GROUPS, sides, 0.0), 1)
        offset = tl.sum(tl.where(column[None, :] == kind[:, None], sides, 0.0), 1)
        acc = acc * power(21) + offset[:, None]
    acc = acc / tl.maximum(mass, 1e-30)[:, None]
    result = (pair.to(tl.int64) * (splits + 1) + split) * count + m
    writes = real[:, None] & (dv < DV)[None, :]
    if REPEAT > 1:
        writes &= (dv // G)[None, :] == kind[:, None]
    level = tl.where(mass > 0, (top + tl.log2(tl.maximum(mass, 1e-30))) * LN2, float("-inf"))
    tl.store(out + result[:, None] * DV + dv[None, :], acc, mask=writes)
    tl.store(lse + result, level, mask=real & (kind == 0))
