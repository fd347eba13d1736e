"""The published pattern per head in Triton: masses per token and per offset, counted.

The last queries stand at the end of a tile [B, ·], whether or not there are B of them, so that the
offsets q − k that key block j holds are those of the block diagonals Nk − 1 − j and Nk − 2 − j,
offsets being counted from the far end as the published chunks are.

Sorted sums are never formed. A positive float's bits rank as its value does: the largest value down
to which all entries do not fit under the share is found bit pair by bit pair, and the entries of
just this value that still fit are counted.

Shapes as in `kernels.py`.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

from kvdock_flexprefill.kernels import covering, entropy, tile

LENGTHS = ("rows", "q_length", "k_length", "tiles", "share", "blocks")
"""As in `kernels.py`."""


@triton.jit(do_not_specialize=("rows", "blocks"))
def merge_levels(level, lse, rows, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Join the log-sum-exps of all key blocks, and add log2(rows), for ``ROWS`` queries.

    Args:
        level: float32 [pairs, Nk, B]. lse: float32 [pairs, B]; +inf where there is no query.
    """
    pair = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    level += pair * blocks * BLOCK
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, BLOCK):
        inside = start + c < blocks
        place = level + (start + c)[:, None] * BLOCK + r[None, :]
        part = tl.load(place, mask=inside[:, None], other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, 0))  # finite: every query sees the first block
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(part - higher[None, :]), 0)
        top = higher
    found = top + tl.log2(total * rows)
    tl.store(lse + pair * BLOCK + r, tl.where(r < rows, found, float("inf")))


@triton.jit
def _tile_mass(
    query, lse, k_base, k_row, mass, one, t, tiles, k_length, scale, d,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the mass of each of ``KEYS`` tokens, and their parts of the mass of each offset."""
    c, r = tl.arange(0, KEYS), tl.arange(0, BLOCK)
    column = t * KEYS + c
    base = k_base + tl.cast(t * KEYS, tl.int64) * k_row
    key = tile(base, k_row, c, column < k_length, d, HEAD_DIM, PADDED, WHOLE, UPCAST)
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    share = tl.exp2(logits - lse[:, None])
    if not WHOLE:
        share = tl.where(column[None, :] <= (k_length - BLOCK + r)[:, None], share, 0.0)
    tl.store(mass + column, tl.sum(share, 0))
    # turn row r by r places: entry x holds an offset r − c that is x modulo KEYS
    turned = tl.gather(share, (r[:, None] - c[None, :]) & (KEYS - 1), 1)
    part = BLOCK // KEYS - (r[:, None] - c[None, :] + KEYS) // KEYS
    for e in tl.static_range(0, BLOCK // KEYS + 1):
        own = tl.sum(tl.where(part == e, turned, 0.0), 0)
        place = (tiles - 1 - t - e) * KEYS + c
        tl.store(mass + (e + 1) * one + place, own, mask=place >= 0)


@triton.jit(do_not_specialize=LENGTHS)
def tile_masses(
    q, k, lse, mass,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    pairs, heads, rows, q_length, k_length, tiles, share, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write `_tile_mass` of ``share`` tiles of keys; heads of a group run side by side.

    Args:
        lse: float32 [pairs, B] of `merge_levels`.
        mass: float32 [B / KEYS + 2, pairs, Nk, B], per token, and in parts per offset, counted from
            the far end; part e is not written at its last e · KEYS places.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    r, d = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    real = r >= BLOCK - rows
    level = tl.load(lse + pair * BLOCK + r - (BLOCK - rows), mask=real, other=float("inf"))
    q_base = q + batch * q_batch + head * q_head + tl.cast(q_length - BLOCK, tl.int64) * q_row
    query = tile(q_base, q_row, r, real, d, HEAD_DIM, PADDED, False, UPCAST)
    k_base = k + batch * k_batch + (head // GROUP) * k_head
    mass += pair * tiles * KEYS
    one = tl.cast(pairs, tl.int64) * tiles * KEYS
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tiles)
    # tiles that all queries see to their end
    middle = tl.minimum(tl.maximum((k_length - rows + 1) // KEYS, begin), end)
    for t in tl.range(begin, middle, num_stages=STAGES):
        _tile_mass(
            query, level, k_base, k_row, mass, one, t, tiles, k_length, scale, d,
            HEAD_DIM, PADDED, BLOCK, KEYS, True, UPCAST,
        )  # fmt: skip
    for t in tl.range(middle, end, num_stages=1):
        _tile_mass(
            query, level, k_base, k_row, mass, one, t, tiles, k_length, scale, d,
            HEAD_DIM, PADDED, BLOCK, KEYS, False, UPCAST,
        )  # fmt: skip


@triton.jit
def next_edge(low, step, one, two, three, limit):
    """Move ``low`` up by the steps, three at most, whose sums are still above ``limit``."""
    low += step * (tl.sum(one.to(tl.float64)).to(tl.float32) > limit).to(tl.int32)
    low += step * (tl.sum(two.to(tl.float64)).to(tl.float32) > limit).to(tl.int32)
    return low + step * (tl.sum(three.to(tl.float64)).to(tl.float32) > limit).to(tl.int32)


@triton.jit
def room_at(edge, held, limit):
    """Return how many entries of value ``edge`` (bits) fit between ``held`` and ``limit``."""
    value = edge.to(tl.float32, bitcast=True)
    missing = (limit - held).to(tl.float32)
    return tl.where(value > 0, tl.floor(missing / tl.where(value > 0, value, 1.0)), 0.0).to(
        tl.int32
    )


@triton.jit(do_not_specialize=("pairs", "k_length", "blocks"))
def count_largest(
    mass, sums, count, pairs, k_length, blocks, gamma,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count one head's largest tokens, or offsets, with a sum ≤ gamma, plus one; sum blocks.

    Args:
        mass: of `tile_masses`; the parts of the offsets are joined here.
        sums: float32 [2, pairs, Nk]. count: int32 [2, pairs].
    """
    pair, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entries = blocks * BLOCK
    one_part = tl.cast(pairs, tl.int64) * entries
    mass += kind * one_part + pair * entries
    sums += (kind * pairs + pair) * blocks
    b, c = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    for start in range(0, blocks, CHUNK):
        inside = start + b < blocks
        place = (start + b)[:, None] * BLOCK + c[None, :]
        part = tl.load(mass + place, mask=inside[:, None], other=0.0)
        if kind == 1:
            for e in tl.static_range(1, BLOCK // KEYS + 1):
                written = place < entries - e * KEYS
                part += tl.load(mass + e * one_part + place, mask=written, other=0.0)
            tl.store(mass + place, part, mask=inside[:, None])
        tl.store(sums + start + b, tl.sum(part, 1), mask=inside)
    tl.debug_barrier()
    e = tl.arange(0, CHUNK * BLOCK)
    entries = blocks * BLOCK
    edge, step = blocks * 0, blocks * 0 + (1 << 28)  # four steps reach 2.0
    for _ in range(15):
        one = tl.zeros([CHUNK * BLOCK], tl.float32)
        two = tl.zeros([CHUNK * BLOCK], tl.float32)
        three = tl.zeros([CHUNK * BLOCK], tl.float32)
        for start in range(0, entries, CHUNK * BLOCK):
            part = tl.load(mass + start + e, mask=start + e < entries, other=0.0)
            bits = part.to(tl.int32, bitcast=True) - edge
            one += tl.where(bits >= step, part, 0.0)
            two += tl.where(bits >= 2 * step, part, 0.0)
            three += tl.where(bits >= 3 * step, part, 0.0)
        edge = next_edge(edge, step, one, two, three, gamma)
        step = step // 4
    total, held = tl.zeros([CHUNK * BLOCK], tl.float32), tl.zeros([CHUNK * BLOCK], tl.float32)
    larger, equal = tl.zeros([CHUNK * BLOCK], tl.int32), tl.zeros([CHUNK * BLOCK], tl.int32)
    for start in range(0, entries, CHUNK * BLOCK):
        part = tl.load(mass + start + e, mask=start + e < entries, other=0.0)
        bits = part.to(tl.int32, bitcast=True)
        total += part
        held += tl.where(bits > edge, part, 0.0)
        larger += (bits > edge).to(tl.int32)
        equal += (bits == edge).to(tl.int32)
    room = room_at(edge, tl.sum(held.to(tl.float64)), gamma)
    found = tl.sum(larger) + tl.minimum(room, tl.sum(equal))
    found = tl.where(tl.sum(total.to(tl.float64)).to(tl.float32) <= gamma, k_length, found)
    tl.store(count + kind * pairs + pair, found + 1)


@triton.jit(do_not_specialize=("pairs", "blocks", "least", "most"))
def decide_compat(
    sums, count, mean, chosen, aware, pairs, blocks, tau, least, most,
    PUBLISHED: tl.constexpr, WIDTH: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Choose one head's verticals and slashes and say whether it is query-aware.

    Args:
        sums, count: of `count_largest`. chosen: int8 [2, pairs, Nk], verticals and slashes.
    """
    pair = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    inside = j < blocks
    vertical = tl.load(sums + pair * blocks + j, mask=inside, other=0.0)
    slash = tl.load(sums + (pairs + pair) * blocks + j, mask=inside, other=0.0)
    verticals = tl.minimum(tl.maximum(tl.load(count + pair) // PUBLISHED + 1, least), most)
    slashes = tl.minimum(tl.maximum(tl.load(count + pairs + pair) // PUBLISHED + 1, least), most)
    if PATTERN:
        pooled = tl.load(mean + pair * blocks + j, mask=inside, other=float("-inf"))
        pooled = tl.exp(pooled - tl.max(pooled, 0))
        pooled = pooled / tl.sum(pooled, 0)
        apart = entropy(pooled) + entropy(vertical) - 2.0 * entropy((pooled + vertical) * 0.5)
        least_share = tl.min(tl.where(inside, tl.minimum(pooled, vertical), 1.0), 0)
        trusted = tl.sqrt(tl.maximum(tl.sum(apart, 0) * 0.5, 0.0)) < tau
        trusted = trusted & (least_share > 0)  # the published divergence is NaN there
        tl.store(aware + pair, trusted.to(tl.int8))
        verticals = tl.where(trusted, least, verticals)
        slashes = tl.where(trusted, least, slashes)
    order = tl.where(j == 0, 2.0, vertical)
    kept = covering(vertical, order, inside, 0.0, verticals, verticals, WIDTH)
    tl.store(chosen + pair * blocks + j, kept.to(tl.int8), mask=inside)
    order = tl.where(j == 0, 2.0, slash)
    kept = covering(slash, order, inside, 0.0, slashes, slashes, WIDTH)
    tl.store(chosen + (pairs + pair) * blocks + j, kept.to(tl.int8), mask=inside)
