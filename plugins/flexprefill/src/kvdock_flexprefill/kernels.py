"""FlexPrefill's pattern per head in Triton: one pass over the scores of the last queries.

A key block and a block diagonal both hold whole tiles [R, B] of the last queries' scores, so the
log-sum-exp of every row of every tile is all that has to be kept: [R, Nk] numbers per head instead
of R·N probabilities, and no second pass. Logits and log-sum-exps are in base 2.

Shapes: b rows, H query heads, K key/value heads, G = H/K, Q queries, N keys, R ≤ B last queries, B
tokens per block, Nk key blocks, D head_dim.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ("rows", "q_length", "k_length", "blocks", "share")
"""Arguments that change from prompt to prompt: their values must not compile a kernel anew."""


@triton.jit
def tile(
    base, row, offset, inside, d,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load rows [·, PADDED]; rows not ``inside`` (unless ``WHOLE``) and added channels are zero."""
    place = base + offset[:, None] * row + d[None, :]
    if WHOLE and HEAD_DIM == PADDED:
        states = tl.load(place)
    elif WHOLE:
        states = tl.load(place, mask=(d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == PADDED:
        states = tl.load(place, mask=inside[:, None], other=0.0)
    else:
        states = tl.load(place, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        states = states.to(tl.float32)
    return states


@triton.jit
def _block_level(
    query, k_base, k_row, level, mean, j, first, rows, k_length, blocks, scale, natural, d,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, PATTERN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write one key block's log-sum-exp per query and, for the pattern test, its mean score.

    ``WHOLE``: all of its keys exist and are seen by every query.
    """
    c, r = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    column = j * BLOCK + c
    base = k_base + tl.cast(j * BLOCK, tl.int64) * k_row
    key = tile(base, k_row, c, column < k_length, d, HEAD_DIM, PADDED, WHOLE, UPCAST)
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
    if PATTERN:  # queries and keys that do not exist are zero and add nothing
        count = tl.minimum(BLOCK, k_length - j * BLOCK) * rows
        tl.store(mean + j, tl.sum(tl.sum(logits, 1), 0) * natural / count)
    logits = logits * scale
    if WHOLE:
        top = tl.max(logits, 1)
        total = tl.sum(tl.exp2(logits - top[:, None]), 1)
        own = top + tl.log2(total)
    else:
        logits = tl.where(column[None, :] <= (first + r)[:, None], logits, float("-inf"))
        top = tl.max(logits, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(logits - top[:, None]), 1)
        seen = total > 0
        own = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(level + tl.cast(j, tl.int64) * BLOCK + r, own)


@triton.jit(do_not_specialize=LENGTHS)
def block_levels(
    q, k, level, mean,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    heads, rows, q_length, k_length, blocks, share, scale, natural,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PATTERN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write `_block_level` of ``share`` key blocks; heads of a group run side by side."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    r, d = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    first = k_length - rows
    q_base = q + batch * q_batch + head * q_head + tl.cast(q_length - rows, tl.int64) * q_row
    query = tile(q_base, q_row, r, r < rows, d, HEAD_DIM, PADDED, False, UPCAST)
    k_base = k + batch * k_batch + (head // GROUP) * k_head
    level += pair * blocks * BLOCK
    mean += pair * blocks
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, blocks)
    # blocks that all queries see to their end
    middle = tl.minimum(tl.maximum((first + 1) // BLOCK, begin), end)
    for j in tl.range(begin, middle, num_stages=STAGES):
        _block_level(
            query, k_base, k_row, level, mean, j, first, rows, k_length, blocks, scale, natural, d,
            HEAD_DIM, PADDED, BLOCK, True, PATTERN, UPCAST,
        )  # fmt: skip
    for j in tl.range(middle, end, num_stages=1):
        _block_level(
            query, k_base, k_row, level, mean, j, first, rows, k_length, blocks, scale, natural, d,
            HEAD_DIM, PADDED, BLOCK, False, PATTERN, UPCAST,
        )  # fmt: skip


@triton.jit
def covering(mass, order, inside, gamma, least, most, WIDTH: tl.constexpr):
    """Mark the largest entries by ``order`` ≥ 0 that hold a share gamma of ``mass``, [WIDTH].

    At least ``least`` and at most ``most`` of them; of equal entries the first ones. A positive
    float's bits rank as its value does, so bisection over them ends at an entry exactly.
    """
    bits = tl.where(inside, order.to(tl.int32, bitcast=True), -1)
    mass = tl.where(inside, mass, 0.0)
    target = gamma * tl.sum(mass, 0)
    low = tl.sum(inside.to(tl.int32), 0) * 0
    high = low + 0x40800000  # 4.0, above every order
    for _ in range(31):
        middle = low + (high - low) // 2
        above = bits >= middle
        count = tl.sum(above.to(tl.int32), 0)
        held = tl.sum(tl.where(above, mass, 0.0), 0)
        enough = ((held >= target) & (count >= least)) | (count >= most)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above, equal = bits > low, bits == low
    count = tl.sum(above.to(tl.int32), 0)
    missing = tl.maximum(target - tl.sum(tl.where(above, mass, 0.0), 0), 0.0)
    each = tl.max(tl.where(equal, order, 0.0), 0)
    wanted = tl.where(each * WIDTH > missing, tl.ceil(missing / each), 1.0 * WIDTH).to(tl.int32)
    wanted = tl.minimum(tl.maximum(count + wanted, least), most) - count
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))


@triton.jit
def entropy(p):
    """Return p·ln p, zero at zero."""
    return tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)


@triton.jit(do_not_specialize=("rows", "k_length", "blocks", "least", "most"))
def decide(
    level, mean, parts, chosen, aware,
    pairs, rows, k_length, blocks, gamma, tau, least, most,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Choose one head's verticals and slashes and say whether it is query-aware.

    Args:
        parts: float32 [2, pairs, Nk], room for the mass of each key block, from queries in the
            block before the last and from those in the last.
        chosen: int8 [2, pairs, Nk], verticals and slashes.
    """
    pair = tl.program_id(0).to(tl.int64)
    level += pair * blocks * BLOCK
    older_base, newer_base = parts + pair * blocks, parts + (pairs + pair) * blocks
    r, c = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, CHUNK):
        inside = start + c < blocks
        place = level + (start + c)[:, None] * BLOCK + r[None, :]
        part = tl.load(place, mask=inside[:, None], other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, 0))  # finite: every query sees the first block
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(part - higher[None, :]), 0)
        top = higher
    lse = top + tl.log2(total)
    newer = (k_length - rows + r) // BLOCK == blocks - 1
    for start in range(0, blocks, CHUNK):
        inside = start + c < blocks
        place = level + (start + c)[:, None] * BLOCK + r[None, :]
        part = tl.load(place, mask=inside[:, None], other=float("-inf"))
        share = tl.where((r < rows)[None, :], tl.exp2(part - lse[None, :]) / rows, 0.0)
        last = tl.sum(tl.where(newer[None, :], share, 0.0), 1)
        before = tl.sum(tl.where(newer[None, :], 0.0, share), 1)
        tl.store(older_base + start + c, before, mask=inside)
        tl.store(newer_base + start + c, last, mask=inside)
    tl.debug_barrier()
    j = tl.arange(0, WIDTH)
    inside = j < blocks
    vertical = tl.load(older_base + j, mask=inside, other=0.0)
    vertical += tl.load(newer_base + j, mask=inside, other=0.0)
    slash = tl.load(newer_base + (blocks - 1 - j), mask=inside, other=0.0)
    slash += tl.load(older_base + (blocks - 2 - j), mask=j < blocks - 1, other=0.0)
    if PATTERN:
        pooled = tl.load(mean + pair * blocks + j, mask=inside, other=float("-inf"))
        pooled = tl.exp(pooled - tl.max(pooled, 0))
        pooled = pooled / tl.sum(pooled, 0)
        apart = entropy(pooled) + entropy(vertical) - 2.0 * entropy((pooled + vertical) * 0.5)
        trusted = tl.sqrt(tl.maximum(tl.sum(apart, 0) * 0.5, 0.0)) < tau
        tl.store(aware + pair, trusted.to(tl.int8))
        most = tl.where(trusted, least, most)
    order = tl.where(j == 0, 2.0, vertical)
    kept = covering(vertical, order, inside, gamma, least, most, WIDTH)
    tl.store(chosen + pair * blocks + j, kept.to(tl.int8), mask=inside)
    order = tl.where(j == 0, 2.0, slash)
    kept = covering(slash, order, inside, gamma, least, most, WIDTH)
    tl.store(chosen + (pairs + pair) * blocks + j, kept.to(tl.int8), mask=inside)
