"""One tile of packed keys and values: logits from codes, and codes weighed into running sums.

A tile is one block of the packed layout, or several small ones. Shapes as in `decode_kernel.py`.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (arguments and tuples are the compiler's, not Python's)
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl


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
def power(exponent):
    """Return 2^exponent as a constant."""
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
def _halves(x):
    """Return float32 numbers as a sum of two float16."""
    near = x.to(tl.float16)
    return near, (x - near.to(tl.float32)).to(tl.float16)


@triton.jit
def block_logits(
    q, codes_at, scale_at, zero_at, block, d, r, scale, key_blocks,
    DK: tl.constexpr, DKP: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr,
    BITS: tl.constexpr, FINE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the base-2 logits of a tile's planes, a tuple of [M, ROWS].

    A tile is one block, or several small ones, the last of which may not exist. One half for q⊙s
    is the largest rounding of the whole attention; ``FINE`` takes two halves, which costs a second
    product.
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
            if FINE:
                scaled, lost = _halves(q.to(tl.float32) * s.to(tl.float32)[None, :])
            else:
                scaled = q * s[None, :]
            offset = _column(offsets, column, i)[:, None]
            for e in tl.static_range(EACH):
                codes = _plane(words, upper, i * EACH + e, BITS, INTERPRET)
                lift = scale * power(24 - BITS * ((i * EACH + e) % HALF))
                product = tl.dot(scaled, codes)
                if FINE:
                    product = tl.dot(lost, codes, product)
                logits = logits + (product * lift + offset,)
    else:
        for j in tl.static_range(PLANES):
            token = block * TILE + (r // N) * (N * PLANES) + j * N
            at = (token // G).to(tl.int64)[None, :] * DK + d[:, None]
            s = tl.load(scale_at + at, mask=inside, other=0.0).to(tl.float32)
            z = tl.load(zero_at + at, mask=inside, other=0.0).to(tl.float32)
            codes = _plane(words, upper, j, BITS, INTERPRET).to(tl.float32)
            keys = codes * power(24 - BITS * (j % HALF)) * s + z
            if FINE:
                near, lost = _halves(keys)
                product = tl.dot(q, lost, tl.dot(q, near))
            else:
                product = tl.dot(q, keys.to(tl.float16))
            logits = logits + (product * scale,)
    return logits


@triton.jit
def value_tile(
    q, codes_at, scale_at, zero_at, from_codes, from_scale, from_zero, acc, extra, top,
    tile, d, r, dv, column, token_of, values_end, scale, key_blocks, value_blocks,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr,
    BITS: tl.constexpr, FINE: tl.constexpr, PART: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Take one tile into the running sums; ``PART``: not all of its tokens have packed values.

    A probability is multiplied by 2^(3 − BITS·place) before it becomes a half, which both undoes
    its plane's power of two and keeps it in the middle of the halves' range. The same halves weigh
    the zero points, one column of channels' group each, and a column of ones that counts the mass.
    """
    PLANES: tl.constexpr = 16 // BITS
    HALF: tl.constexpr = 8 // BITS
    TILE: tl.constexpr = ROWS * PLANES
    logits = block_logits(
        q, codes_at, scale_at, zero_at, tile, d, r, scale, key_blocks,
        DK, DKP, N, ROWS, G, BITS, FINE, INTERPRET,
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
def finite(top):
    """Return the maximum, or 0 where nothing was seen yet."""
    return tl.where(top == float("-inf"), 0.0, top)
