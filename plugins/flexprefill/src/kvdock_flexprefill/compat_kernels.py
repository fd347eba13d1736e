"""The published pattern per head in Triton: masses per token and per offset, counted.

The last queries stand at the end of a tile [B, ·], whether or not there are B of them, so that the
offsets q − k that key block j holds are those of the block diagonals Nk − 1 − j and Nk − 2 − j,
offsets being counted from the far end as the published chunks are.

Shapes as in `kernels.py`; S parts of the keys.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

from kvdock_flexprefill.kernels import entropy, tile
from kvdock_flexprefill.search_kernels import find, largest, room_at

LENGTHS = ("rows", "q_length", "k_length", "share")
"""As in `kernels.py`."""


@triton.jit
def _join(top, total, part):
    """Join log-sum-exps [R, n] to running ones; ``top`` stays finite."""
    higher = tl.maximum(top, tl.max(part, 1))
    return higher, total * tl.exp2(top - higher) + tl.sum(tl.exp2(part - higher[:, None]), 1)


@triton.jit(do_not_specialize=(*LENGTHS, "blocks"))
def part_levels(
    q, k, level, mean,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    heads, rows, q_length, k_length, blocks, share, scale, natural,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PATTERN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the last queries' log-sum-exps over ``share`` key blocks, and mean scores.

    Args:
        level: float32 [pairs, S, B] in base 2. mean: float32 [pairs, Nk], for the pattern test.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    r, c, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, PADDED)
    first = k_length - rows
    q_base = q + batch * q_batch + head * q_head + tl.cast(q_length - rows, tl.int64) * q_row
    query = tile(q_base, q_row, r, r < rows, d, HEAD_DIM, PADDED, False, UPCAST)
    k_base = k + batch * k_batch + (head // GROUP) * k_head
    mean += pair * blocks
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, blocks)
    # blocks that all queries see to their end
    middle = tl.minimum(tl.maximum((first + 1) // BLOCK, begin), end)
    top = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(begin, middle, num_stages=STAGES):
        base = k_base + tl.cast(j * BLOCK, tl.int64) * k_row
        key = tile(base, k_row, c, c >= 0, d, HEAD_DIM, PADDED, True, UPCAST)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if PATTERN:  # queries that do not exist are zero and add nothing
            tl.store(mean + j, tl.sum(tl.sum(logits, 1), 0) * natural / (BLOCK * rows))
        top, total = _join(top, total, logits * scale)
    for j in tl.range(middle, end, num_stages=1):
        column = j * BLOCK + c
        base = k_base + tl.cast(j * BLOCK, tl.int64) * k_row
        key = tile(base, k_row, c, column < k_length, d, HEAD_DIM, PADDED, False, UPCAST)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if PATTERN:
            count = tl.minimum(BLOCK, k_length - j * BLOCK) * rows
            tl.store(mean + j, tl.sum(tl.sum(logits, 1), 0) * natural / count)
        seen = column[None, :] <= (first + r)[:, None]
        top, total = _join(top, total, tl.where(seen, logits * scale, float("-inf")))
    found = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(level + (pair * tl.num_programs(1) + tl.program_id(1)) * BLOCK + r, found)


@triton.jit
def _joined_level(level, r, real, parts, rows, BLOCK: tl.constexpr):
    """Return the log-sum-exps of all keys plus log2(rows); +inf where there is no query."""
    top = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    p = tl.arange(0, 8)
    for start in range(0, parts, 8):
        mask = real[:, None] & (start + p < parts)[None, :]
        place = level + (start + p)[None, :] * BLOCK + r[:, None]
        top, total = _join(top, total, tl.load(place, mask=mask, other=float("-inf")))
    return tl.where(real, top + tl.log2(tl.where(real, total * rows, 1.0)), float("inf"))


@triton.jit
def _quarters(share, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Cut a tile [B, KEYS], rows in the order of `tile_masses`, into four [B/4, B/4, ·].

    What is cut apart lies in different registers of the same threads: nothing moves.
    """
    PART: tl.constexpr = BLOCK // 4
    WARPS: tl.constexpr = max(1, BLOCK // 32)
    cut = tl.reshape(share, (2, WARPS, 2, PART // WARPS, KEYS // PART, PART))
    cut = tl.permute(cut, (1, 3, 5, 4, 0, 2))
    even, odd = tl.split(tl.reshape(cut, (PART, PART, KEYS // PART, 2, 2)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return zero, one, two, three


@triton.jit
def _turned_sum(tile, PART: tl.constexpr, STEPS: tl.constexpr):
    """Turn row b of [B/4, B/4, STEPS] by b places, offsets being columns then, and add the rows."""
    b, x = tl.arange(0, PART), tl.arange(0, PART)
    places = ((b[:, None] - x[None, :]) & (PART - 1))[:, :, None]
    places = tl.broadcast_to(places, (PART, PART, STEPS))
    return tl.sum(tl.gather(tile, places, 1), 0)


@triton.jit
def _tile_mass(
    query, lse, k_base, k_row, tokens, offsets, t, tiles, k_length, scale, r, d,
    one, two, three, last,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the mass of each of ``KEYS`` tokens, and that of each offset no later key adds to.

    Args:
        one, two, three, last: float32 [B/4, B/4], sums of quarters on a diagonal of which one, two,
            three and all four have been met.

    Returns:
        The same for the next tile.
    """
    PART: tl.constexpr = BLOCK // 4
    c, b = tl.arange(0, KEYS), tl.arange(0, PART)
    column = t * KEYS + c
    base = k_base + tl.cast(t * KEYS, tl.int64) * k_row
    key = tile(base, k_row, c, column < k_length, d, HEAD_DIM, PADDED, WHOLE, UPCAST)
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    share = tl.exp2(logits - lse[:, None])
    if not WHOLE:
        share = tl.where(column[None, :] <= (k_length - BLOCK + r)[:, None], share, 0.0)
    tl.store(tokens + column, tl.sum(share, 0))
    a_zero, a_one, a_two, a_three = _quarters(share, BLOCK, KEYS)
    # of a diagonal's quarters, what lies below its middle belongs to the offsets after it
    upper = b[:, None] >= b[None, :]
    if KEYS == PART:
        full = tl.reshape(a_three, (PART, PART)) + three
        met = tl.where(upper, full, last)[:, :, None]
        three = tl.reshape(a_two, (PART, PART)) + two
        two = tl.reshape(a_one, (PART, PART)) + one
        one, last = tl.reshape(a_zero, (PART, PART)), full
    else:
        tl.static_assert(KEYS == 2 * PART)
        zero_left, zero_right = tl.split(a_zero)
        one_left, one_right = tl.split(a_one)
        two_left, two_right = tl.split(a_two)
        three_left, three_right = tl.split(a_three)
        full, next_full = three_left + three, three_right + (two_left + two)
        met = tl.join(tl.where(upper, full, last), tl.where(upper, next_full, full))
        three = two_right + (one_left + one)
        two = one_right + zero_left
        one, last = zero_right, next_full
    own = _turned_sum(met, PART, KEYS // PART)
    chunk = (tiles - t) * (KEYS // PART) - 1 - tl.arange(0, KEYS // PART)
    tl.store(offsets + chunk[None, :] * PART + b[:, None], own)
    return one, two, three, last


@triton.jit(do_not_specialize=(*LENGTHS, "tiles", "parts"))
def tile_masses(
    q, k, level, mass, seams,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    pairs, heads, rows, q_length, k_length, tiles, share, parts, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write `_tile_mass` of ``share`` tiles of keys; heads of a group run side by side.

    Queries are dealt to rows so that each thread of four warps holds one of every quarter.

    Args:
        level: of `part_levels`.
        mass: float32 [2, pairs, Nk, B], per token, and per offset, counted from the far end.
        seams: float32 [pairs, S, B], what this program's keys add to the offsets that the next
            program writes first, those of the B places before Nk · B − its first key.
    """
    PART: tl.constexpr = BLOCK // 4
    WARPS: tl.constexpr = max(1, BLOCK // 32)
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    p, d = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    EIGHT: tl.constexpr = PART // WARPS
    r = (p // (BLOCK // 2) * 2 + p // EIGHT % 2) * PART
    r += p // (2 * EIGHT) % WARPS * EIGHT + p % EIGHT
    real = r >= BLOCK - rows
    level += pair * parts * BLOCK
    lse = _joined_level(level, r - (BLOCK - rows), real, parts, rows, BLOCK)
    q_base = q + batch * q_batch + head * q_head + tl.cast(q_length - BLOCK, tl.int64) * q_row
    query = tile(q_base, q_row, r, real, d, HEAD_DIM, PADDED, False, UPCAST)
    k_base = k + batch * k_batch + (head // GROUP) * k_head
    tokens = mass + pair * tiles * KEYS
    offsets = tokens + tl.cast(pairs, tl.int64) * tiles * KEYS
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tiles)
    # tiles that all queries see to their end
    middle = tl.minimum(tl.maximum((k_length - rows + 1) // KEYS, begin), end)
    one, two = tl.zeros([PART, PART], tl.float32), tl.zeros([PART, PART], tl.float32)
    three, last = tl.zeros([PART, PART], tl.float32), tl.zeros([PART, PART], tl.float32)
    for t in tl.range(begin, middle, num_stages=STAGES):
        one, two, three, last = _tile_mass(
            query, lse, k_base, k_row, tokens, offsets, t, tiles, k_length, scale, r, d,
            one, two, three, last, HEAD_DIM, PADDED, BLOCK, KEYS, True, UPCAST,
        )  # fmt: skip
    for t in tl.range(middle, end, num_stages=1):
        one, two, three, last = _tile_mass(
            query, lse, k_base, k_row, tokens, offsets, t, tiles, k_length, scale, r, d,
            one, two, three, last, HEAD_DIM, PADDED, BLOCK, KEYS, False, UPCAST,
        )  # fmt: skip
    if end < tiles:
        b = tl.arange(0, PART)
        upper = b[:, None] >= b[None, :]
        seam = seams + (pair * tl.num_programs(1) + tl.program_id(1)) * BLOCK + b
        for chunk in tl.static_range(0, 4):
            met = tl.where(upper, three, last)[:, :, None]
            own = tl.reshape(_turned_sum(met, PART, 1), (PART,))
            tl.store(seam + (3 - chunk) * PART, own)
            last, three, two, one = three, two, one, tl.zeros_like(one)


@triton.jit(do_not_specialize=("pairs", "k_length", "blocks", "span", "parts", "least", "most"))
def choose(
    mass, seams, mean, sums, count, slots, chosen, aware,
    pairs, k_length, blocks, span, parts, gamma, tau, least, most,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, PUBLISHED: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Choose one head's verticals, or slashes, and say whether it is query-aware.

    Counted are the largest tokens, or offsets, with a sum ≤ gamma, plus one.

    Args:
        mass, seams: of `tile_masses`, joined here; ``parts`` programs had ``span`` keys each.
        sums: float32 [2, 2, pairs, Nk], the masses of blocks, and of verticals again.
        count: int32 [2, pairs]. slots: int32 [2, pairs, 1 + SLOTS].
        chosen: int8 [2, pairs, Nk], verticals and slashes. aware: int8 [pairs].
    """
    pair, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entries = blocks * BLOCK
    one_part = tl.cast(pairs, tl.int64) * entries
    tokens = mass + pair * entries
    mass = tokens + kind * one_part
    sums += (kind * pairs + pair) * blocks
    other_sums = sums + 2 * tl.cast(pairs, tl.int64) * blocks
    b, c = tl.arange(0, CHUNK // BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([CHUNK // BLOCK], tl.float64)
    for start in range(0, blocks, CHUNK // BLOCK):
        inside = start + b < blocks
        place = (start + b)[:, None] * BLOCK + c[None, :]
        part = tl.load(mass + place, mask=inside[:, None], other=0.0)
        if kind == 1:
            back = entries - 1 - place
            seam, at = back // span - 1, BLOCK - 1 - back % span
            joined = inside[:, None] & (seam >= 0) & (at >= 0)
            part += tl.load(seams + (pair * parts + seam) * BLOCK + at, mask=joined, other=0.0)
            tl.store(mass + place, part, mask=joined)
        own = tl.sum(part, 1)
        total += own.to(tl.float64)
        tl.store(sums + start + b, own, mask=inside)
        if PATTERN:
            part = tl.load(tokens + place, mask=inside[:, None], other=0.0)
            tl.store(other_sums + start + b, tl.sum(part, 1), mask=inside)
    tl.debug_barrier()
    slots += (kind * pairs + pair) * (1 + SLOTS)
    edge, held, larger, equal = find(mass, entries, 1.0, gamma, slots, CHUNK, SLOTS)
    found = larger + tl.minimum(room_at(edge, held, gamma), equal)
    found = tl.where(tl.sum(total, 0).to(tl.float32) <= gamma, k_length, found) + 1
    tl.store(count + kind * pairs + pair, found)
    wanted = tl.minimum(tl.maximum(found // PUBLISHED + 1, least), most)
    j = tl.arange(0, WIDTH)
    inside = j < blocks
    own = tl.load(sums + j, mask=inside, other=0.0)
    if PATTERN:
        vertical = tl.load(other_sums + j, mask=inside, other=0.0)
        pooled = tl.load(mean + pair * blocks + j, mask=inside, other=float("-inf"))
        pooled = tl.exp(pooled - tl.max(pooled, 0))
        pooled = pooled / tl.sum(pooled, 0)
        apart = entropy(pooled) + entropy(vertical) - 2.0 * entropy((pooled + vertical) * 0.5)
        least_share = tl.min(tl.where(inside, tl.minimum(pooled, vertical), 1.0), 0)
        trusted = tl.sqrt(tl.maximum(tl.sum(apart, 0) * 0.5, 0.0)) < tau
        trusted = trusted & (least_share > 0)  # the published divergence is NaN there
        if kind == 0:
            tl.store(aware + pair, trusted.to(tl.int8))
        wanted = tl.where(trusted, least, wanted)
    kept = largest(tl.where(j == 0, 1.5, own), inside, wanted)
    tl.store(chosen + (kind * pairs + pair) * blocks + j, kept.to(tl.int8), mask=inside)
