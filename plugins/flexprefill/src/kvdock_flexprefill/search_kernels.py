"""Where a share of a sum ends among unsorted entries, in Triton: the published cumulative sums.

Sorted sums are never formed. A positive float's bits rank as its value does: the largest value down
to which all entries do not fit under the limit is bracketed by its bits. A sample says where to
look, one pass over all entries confirms it, and what lies between is searched in registers.
"""

# ruff: noqa: ANN001, ANN201  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def guess_edge(values, entries, rest, CHUNK: tl.constexpr):
    """Return where a sample's smallest entries hold ``rest`` of the sum, to 1/32 octave, in bits.

    Small entries are many, so that a sample says more of them than of the large ones.
    """
    stride = tl.maximum(entries // CHUNK, 1)
    place = tl.arange(0, CHUNK) * stride
    part = tl.load(values + place, mask=place < entries, other=0.0)
    bits = part.to(tl.int32, bitcast=True)
    rest = rest / stride
    edge, step = entries * 0, entries * 0 + (1 << 28)
    n = tl.arange(0, 4)
    for _ in range(6):
        above = edge + (n + 1) * step
        below = tl.sum(tl.where(bits[None, :] < above[:, None], part[None, :], 0.0), 1)
        edge += step * tl.sum(((below <= rest) & (n < 3)).to(tl.int32), 0)
        step = step // 4
    return edge


@triton.jit
def largest(values, inside, wanted):
    """Mark the ``wanted`` largest entries [WIDTH], all of at least 0 and less than 2.

    Of equal entries the first ones. Two bits of the smallest are found at a time.
    """
    bits = tl.where(inside, values.to(tl.int32, bitcast=True), -1)
    edge, step = wanted * 0, wanted * 0 + (1 << 28)
    for _ in range(15):
        # three counts, of less than 2^20, in one sum
        over = (bits >= edge + step).to(tl.int64) + ((bits >= edge + 2 * step).to(tl.int64) << 20)
        counts = tl.sum(over + ((bits >= edge + 3 * step).to(tl.int64) << 40), 0)
        digit = ((counts & 0xFFFFF) >= wanted).to(tl.int32)
        digit += (((counts >> 20) & 0xFFFFF) >= wanted).to(tl.int32)
        edge += step * (digit + ((counts >> 40) >= wanted).to(tl.int32))
        step = step // 4
    above, equal = bits > edge, (bits == edge) & inside
    missing = wanted - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))


@triton.jit
def between(values, entries, one, two, three, CHUNK: tl.constexpr):
    """Sum and count the entries from each of three values (bits) on: float64 and int32."""
    e = tl.arange(0, CHUNK)
    sum_one, count_one = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.int32)
    sum_two, count_two = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.int32)
    sum_three, count_three = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.int32)
    for start in tl.range(0, entries, CHUNK, num_stages=3):
        part = tl.load(values + start + e, mask=start + e < entries, other=0.0)
        bits = part.to(tl.int32, bitcast=True)
        sum_one += tl.where(bits >= one, part, 0.0)
        sum_two += tl.where(bits >= two, part, 0.0)
        sum_three += tl.where(bits >= three, part, 0.0)
        count_one += (bits >= one).to(tl.int32)
        count_two += (bits >= two).to(tl.int32)
        count_three += (bits >= three).to(tl.int32)
    return (
        tl.sum(sum_one.to(tl.float64), 0), tl.sum(count_one, 0),
        tl.sum(sum_two.to(tl.float64), 0), tl.sum(count_two, 0),
        tl.sum(sum_three.to(tl.float64), 0), tl.sum(count_three, 0),
    )  # fmt: skip


@triton.jit
def gather(values, entries, low, high, slots, CHUNK: tl.constexpr):
    """Collect the entries of ``low ≤ bits < high``, in any order, behind their number."""
    e = tl.arange(0, CHUNK)
    tl.store(slots, 0)
    tl.debug_barrier()
    for start in tl.range(0, entries, CHUNK, num_stages=3):
        inside = start + e < entries
        bits = tl.load(values + start + e, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        inside = inside & (bits >= low) & (bits < high)
        place = tl.atomic_add(slots + e * 0, 1, mask=inside, sem="relaxed", scope="cta")
        tl.store(slots + 1 + place, bits, mask=inside)
    tl.debug_barrier()


@triton.jit
def find(values, entries, whole, limit, slots, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """Find the largest value from which on all entries sum to more than ``limit``.

    Args:
        values: float32, ``entries`` of at least 0 and less than 2, with a sum of about ``whole``.
        slots: int32 [1 + SLOTS], room for the entries that the search ends with.

    Returns:
        (its bits, the float64 sum of the larger entries, their number, the number of its equals).
    """
    # from `low` on too much, from `high` on not; `held` and `larger` are those from `high` on
    low, high = entries * 0, entries * 0 + 0x40000000
    held, larger, inside = entries.to(tl.float64) * 0, entries * 0, entries * 1
    two = tl.minimum(guess_edge(values, entries, whole - limit, CHUNK), high - 1)
    one, three = tl.maximum(two - (1 << 19), 1), tl.minimum(two + (1 << 19), high)
    while (inside > SLOTS) & (high - low > 1):
        first, first_count, second, second_count, third, third_count = between(
            values, entries, one, two, three, CHUNK
        )
        from_low = inside + larger
        over_one = first.to(tl.float32) > limit
        over_two = second.to(tl.float32) > limit
        over_three = third.to(tl.float32) > limit
        low = tl.where(over_three, three, tl.where(over_two, two, tl.where(over_one, one, low)))
        from_low = tl.where(
            over_three, third_count,
            tl.where(over_two, second_count, tl.where(over_one, first_count, from_low)),
        )  # fmt: skip
        high = tl.where(over_three, high, tl.where(over_two, three, tl.where(over_one, two, one)))
        held = tl.where(
            over_three, held, tl.where(over_two, third, tl.where(over_one, second, first))
        )
        larger = tl.where(
            over_three, larger,
            tl.where(over_two, third_count, tl.where(over_one, second_count, first_count)),
        )  # fmt: skip
        inside = from_low - larger
        step = tl.maximum((high - low) // 4, 1)
        one = low + step
        two, three = tl.minimum(one + step, high), tl.minimum(one + 2 * step, high)
    equal = inside  # if they are one value
    if inside <= SLOTS:
        gather(values, entries, low, high, slots, CHUNK)
        s = tl.arange(0, SLOTS)
        bits = tl.load(slots + 1 + s, mask=s < inside, other=-1)
        part = tl.where(bits >= 0, bits.to(tl.float32, bitcast=True), 0.0).to(tl.float64)
        n = tl.arange(0, 4)
        while high - low > 1:  # by fifths
            step = (high - low + 4) // 5
            edge = tl.minimum(low + (n + 1) * step, high)
            found = tl.sum(tl.where(bits[None, :] >= edge[:, None], part[None, :], 0.0), 1)
            enough = tl.sum(((held + found).to(tl.float32) > limit).to(tl.int32), 0)
            low += enough * step  # `high` is not enough
            high = tl.minimum(low + step, high)
        held += tl.sum(tl.where(bits > low, part, 0.0), 0)
        larger += tl.sum((bits > low).to(tl.int32), 0)
        equal = tl.sum((bits == low).to(tl.int32), 0)
    return low, held, larger, equal


@triton.jit
def room_at(edge, held, limit):
    """Return how many entries of value ``edge`` (bits) fit between ``held`` and ``limit``."""
    value = edge.to(tl.float32, bitcast=True)
    missing = (limit - held).to(tl.float32)
    return tl.where(value > 0, tl.floor(missing / tl.where(value > 0, value, 1.0)), 0.0).to(
        tl.int32
    )
