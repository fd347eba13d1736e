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

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (arguments and tuples are the compiler's, not Python's)
# mypy: disable-error-code=assignment

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))


@triton.constexpr_function
def _mask(bits, plane):
    """Return the bits of a plane's code in a half word of 16 bits."""
    return ((1 << bits) - 1) << (bits * plane)


@triton.constexpr_function
def _mask_text(bits, plane):
    """Return the instruction that keeps one plane's codes of two words."""
    mask = ((1 << bits) - 1) << (bits * plane)
    return f"and.b32 $0, $1, {mask * 0x10001:#x};"


@triton.constexpr_function
def _power(exponent):
    return 2.0**exponent


@triton.jit
def _upper(words, INTERPRET: tl.constexpr):
    """Bring the upper bytes of the words down."""
    if INTERPRET:
        return words >> 8
    return tl.inline_asm_elementwise(
        "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
    )


@triton.jit
def _plane(words, upper, PLANE: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """Return one plane's codes times 2^(BITS·(PLANE mod P/2) − 24), float16."""
    PLACE: tl.constexpr = PLANE % (8 // BITS)
    source = words
    if PLANE >= 8 // BITS:
        source = upper
    if INTERPRET:
        return (source & _mask(BITS, PLACE)).to(tl.float16, bitcast=True)
    return tl.inline_asm_elementwise(
        _mask_text(BITS, PLACE), "=r,r", [source], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _column(table, index, COLUMN: tl.constexpr):
    """Return one column of a small table."""
    return tl.sum(tl.where(index[None, :] == COLUMN, table, 0.0), 1)


@triton.jit
def _block_logits(
    q, codes_at, scale_at, zero_at, block, d, r, scale, key_blocks,
    DK: tl.constexpr, DKP: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr,
    BITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the base-2 logits of a tile's planes, a tuple of [M, ROWS].

    A tile is one block, or several small ones, the last of which may not exist.
    """
    PLANES: tl.constexpr = 16 // BITS
    HALF: tl.constexpr = 8 // BITS
    TILE: tl.constexpr = ROWS * PLANES
    at = codes_at + tl.cast(block, tl.int64) * (ROWS * DK) + d[:, None] + r[None, :] * DK
    inside = (d < DK)[:, None]
    if ROWS != N:
        inside = inside & (block * (ROWS // N) + r // N < key_blocks)[None, :]
    words = tl.load(at) if DK == DKP and ROWS == N else tl.load(at, mask=inside, other=0)
    upper = _upper(words, INTERPRET)
    logits = ()
    if ROWS == N:  # a plane lies under one scale of every channel
        GROUPS: tl.constexpr = TILE // G if TILE > G else 1
        EACH: tl.constexpr = PLANES // GROUPS
        first = tl.cast(block, tl.int64) * TILE // G * DK
        column = tl.arange(0, 8)
        # columns beyond the last group repeat it and are not read
        zero_at = zero_at + first + d[:, None] + tl.minimum(column, GROUPS - 1)[None, :] * DK
        zero = tl.load(zero_at) if DK == DKP else tl.load(zero_at, mask=inside, other=0.0)
        offsets = tl.dot(q, zero) * scale
        scale_at += first
        for i in tl.static_range(GROUPS):
            if DK == DKP:
                s = tl.load(scale_at + i * DK + d)
            else:
                s = tl.load(scale_at + i * DK + d, mask=d < DK, other=0.0)
            scaled = q * s[None, :]
            offset = _column(offsets, column, i)[:, None]
            for e in tl.static_range(EACH):
                codes = _plane(words, upper, i * EACH + e, BITS, INTERPRET)
                lift = scale * _power(24 - BITS * ((i * EACH + e) % HALF))
                logits = logits + (tl.dot(scaled, codes) * lift + offset,)
    else:
        for j in tl.static_range(PLANES):
            token = block * TILE + (r // N) * (N * PLANES) + j * N
            at = (token // G).to(tl.int64)[None, :] * DK + d[:, None]
            s = tl.load(scale_at + at, mask=inside, other=0.0).to(tl.float32)
            z = tl.load(zero_at + at, mask=inside, other=0.0).to(tl.float32)
            codes = _plane(words, upper, j, BITS, INTERPRET).to(tl.float32)
            keys = codes * _power(24 - BITS * (j % HALF)) * s + z
            logits = logits + (tl.dot(q, keys.to(tl.float16)) * scale,)
    return logits


@triton.jit
def _value_tile(
    q, codes_at, scale_at, zero_at, from_codes, from_scale, from_zero, acc, extra, top,
    tile, d, r, dv, column, token_of, values_end, scale, key_blocks, value_blocks,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr,
    BITS: tl.constexpr, PART: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Take one tile into the running sums; ``PART``: not all of its tokens have packed values.

    A probability is multiplied by 2^(3 − BITS·place) before it becomes a half, which both undoes
    its plane's power of two and keeps it in the middle of the halves' range. The same halves weigh
    the zero points, one column of channels' group each, and a column of ones that counts the mass.
    """
    PLANES: tl.constexpr = 16 // BITS
    HALF: tl.constexpr = 8 // BITS
    TILE: tl.constexpr = ROWS * PLANES
    logits = _block_logits(
        q, codes_at, scale_at, zero_at, tile, d, r, scale, key_blocks,
        DK, DKP, N, ROWS, G, BITS, INTERPRET,
    )  # fmt: skip
    here = tl.cast(tile, tl.int64)
    there = tile * (ROWS // N) + r // N < value_blocks
    if DV == DVP and ROWS == N:
        words = tl.load(from_codes + here * (ROWS * DV))
    else:
        inside = there[:, None] & (dv < DV)[None, :]
        words = tl.load(from_codes + here * (ROWS * DV), mask=inside, other=0)
    upper = _upper(words, INTERPRET)
    parts = ()
    best = tl.full([M, ROWS], float("-inf"), tl.float32)
    for j in tl.static_range(PLANES):
        part = logits[j]
        if PART:
            seen = tile * TILE + token_of + j * N < values_end
            part = tl.where(seen[None, :], part, float("-inf"))
        best = tl.maximum(best, part)
        parts = parts + (part,)
    higher = tl.maximum(top, tl.max(best, 1))
    fade = tl.exp2(top - higher)[:, None]
    acc = acc * fade
    faded = ()
    for place in tl.static_range(HALF):
        faded = faded + (extra[place] * fade,)
    later = faded
    for j in tl.static_range(PLANES):
        of_scale = from_scale + here * (TILE * GROUPS) + j * N
        of_zero = from_zero + here * (TILE * GROUPS) + j * N
        counted = (column < GROUPS)[None, :]
        if ROWS == N:
            s = tl.load(of_scale)
            z = tl.load(of_zero, mask=counted, other=1.0)
        else:
            s = tl.load(of_scale, mask=there[None, :], other=0.0)
            z = tl.load(of_zero, mask=counted & there[:, None], other=1.0)
        p = tl.exp2(parts[j] - (higher - (3 - BITS * (j % HALF)))[:, None]).to(tl.float16)
        later = _replace(later, tl.dot(p, z, later[j % HALF]), j % HALF, HALF)
        acc = tl.dot(p * s, _plane(words, upper, j, BITS, INTERPRET), acc)
    return acc, later, higher


@triton.jit
def _replace(items, item, PLACE: tl.constexpr, COUNT: tl.constexpr):
    """Return the tuple with one entry exchanged."""
    result = ()
    for i in tl.static_range(COUNT):
        if i == PLACE:  # noqa: SIM108  (the compiler takes no tuples from a conditional expression)
            result = result + (item,)
        else:
            result = result + (items[i],)
    return result


@triton.jit
def _finite(top):
    """Return the maximum, or 0 where nothing was seen yet."""
    return tl.where(top == float("-inf"), 0.0, top)


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
    COLUMNS: tl.constexpr, INTERPRET: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend over one split of one row and key/value head.

    Args (beside strides and pointers):
        rows: the cache's row for every row of the grid. count: query rows of a key/value head.
        held: newest tokens whose key window is not packed even if it is full.
        scale: of the logits, times log2(e).
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
            logits = _block_logits(
                q, codes_at, scale_at, zero_at, block, d, r, scale, key_blocks,
                DK, DKP, N, ROWS, G, BITS, INTERPRET,
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
                level = _finite(higher)
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
            level = _finite(higher)
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
            acc, extra, top = _value_tile(
                q, codes_at, scale_at, zero_at, from_codes, from_scale, from_zero,
                acc, extra, top, tile, d, r, dv, column, token_of, values_end, scale,
                key_blocks, value_blocks,
                DK, DKP, DV, DVP, N, ROWS, G, M, GROUPS, BITS, False, INTERPRET,
            )  # fmt: skip
        for tile in tl.range(tl.maximum(begin, whole_end), end, num_stages=1):
            acc, extra, top = _value_tile(
                q, codes_at, scale_at, zero_at, from_codes, from_scale, from_zero,
                acc, extra, top, tile, d, r, dv, column, token_of, values_end, scale,
                key_blocks, value_blocks,
                DK, DKP, DV, DVP, N, ROWS, G, M, GROUPS, BITS, True, INTERPRET,
            )  # fmt: skip
        sides = tl.zeros([M, COLUMNS], tl.float32)
        for place in tl.static_range(8 // BITS):
            sides += extra[place] * _power(BITS * place - 3)
        mass = tl.sum(tl.where(column[None, :] == GROUPS, sides, 0.0), 1)
        offset = tl.sum(tl.where(column[None, :] == kind[:, None], sides, 0.0), 1)
        acc = acc * _power(21) + offset[:, None]
    acc = acc / tl.maximum(mass, 1e-30)[:, None]
    result = (pair.to(tl.int64) * (splits + 1) + split) * count + m
    writes = real[:, None] & (dv < DV)[None, :]
    if REPEAT > 1:
        writes &= (dv // G)[None, :] == kind[:, None]
    level = tl.where(mass > 0, (top + tl.log2(tl.maximum(mass, 1e-30))) * LN2, float("-inf"))
    tl.store(out + result[:, None] * DV + dv[None, :], acc, mask=writes)
    tl.store(lse + result, level, mask=real & (kind == 0))
