"""What a decode step gives up, as one Triton kernel a layer; `frozen_release` calls them.

A program looks at all slots of one row and key/value head, so it can choose the victim, write the
states and mark the slot by itself. Rows that are not over their allowance lose nothing.

Shapes: B rows, K key/value heads, H query heads, G = H/K, N slots, D head_dim, S sinks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""No product and sum in one rounding: the policies' own operations do not fuse them either."""
TILE = 1024
"""Slots looked at together; one size, so that one kernel is compiled."""
NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""The rank of an entry that stays."""


def drop_oldest(
    position: Tensor,
    released: Tensor,
    over: Tensor,
    first: Tensor,
    key: Tensor,
    raw: Tensor | None,
    evicted: Tensor | None,
    turns: tuple[Tensor, Tensor] | None,
) -> None:
    """Give up the lowest position from ``first`` on; turn the keys before it to follow the rest.

    Args:
        position: int32 [B, K, N]. released: int64 [B, K], written. over: bool [B].
        first: int64 [B], entries that stay; they stand in the first slots.
        key: [B, K, N, D]. raw: [B, K, S, D], those slots' keys unturned, written where none of the
            row's entries was evicted before; None where keys stay as they are.
        evicted: int64 [B], before this step. turns: cos and sin, float32 [B, D], after it.
    """
    batch, heads, slots = position.shape
    cos, sin = (over, over) if turns is None else turns
    dim = key.shape[-1]
    with torch.cuda.device_of(key):
        _drop_oldest[(heads, batch)](
            position, released, over.view(torch.int8), first, key, key if raw is None else raw,
            first if evicted is None else evicted, cos, sin,
            *position.stride()[:2], *key.stride()[:2], heads, slots,
            S=0 if raw is None else raw.shape[2],
            SP=1 if raw is None else triton.next_power_of_2(raw.shape[2]),
            D=dim, HALF=triton.next_power_of_2(dim // 2), TILE=TILE, num_warps=4, **EXACT,
        )  # fmt: skip


def drop_smallest_sum(
    position: Tensor,
    released: Tensor,
    over: Tensor,
    recent: Tensor,
    tokens: Tensor,
    logits: Tensor,
    total: Tensor,
    score: Tensor,
    *,
    mean: bool,
) -> None:
    """Add a step's probabilities to the scores and give up the smallest that is not recent.

    Of equal scores the highest position goes.

    Args:
        position: int32 [B, K, N]. released: int64 [B, K], written. over: bool [B].
        recent: int64 [B], last positions that stay. tokens: int64 [B], the step's position.
        logits, total: what attention told: float32 [B, H, N] and [B, H], base 2.
        score: float32 [B, K, N], contiguous, added to; the step's own entry starts from zero.
        mean: average over the group instead of summing up.
    """
    batch, heads, slots = position.shape
    with torch.cuda.device_of(score):
        _drop_smallest_sum[(heads, batch)](
            position, released, over.view(torch.int8), recent, tokens, logits, total, score,
            *position.stride()[:2], heads, slots,
            G=total.shape[1] // heads, MEAN=mean, TILE=TILE, num_warps=8,
        )  # fmt: skip


def drop_least_attended(
    position: Tensor,
    released: Tensor,
    over: Tensor,
    recent: Tensor,
    live: Tensor,
    logits: Tensor,
    total: Tensor,
    order: Tensor,
    scratch: Tensor,
    *,
    mean: bool,
    pool: int,
) -> None:
    """Give up what the step's query attends to least, averaged over neighbours in order.

    Of equal averages the highest position goes. The next entry takes the slot that is given up, so
    the order of the slots changes by one shift.

    Args:
        position: int32 [B, K, N]. released: int64 [B, K], written. over: bool [B].
        recent: int64 [B], last entries that stay. live: int64 [B], entries before this step's.
        logits, total: what attention told: float32 [B, H, N] and [B, H], base 2.
        order: int32 [B, K, N], slots by position, then those that are filled next; rewritten.
        scratch: float32 [B, K, N], overwritten.
        mean: average over the group instead of summing up.
        pool: odd number of neighbours averaged over; beyond the entries that may go lie zeros.
    """
    batch, heads, slots = position.shape
    with torch.cuda.device_of(scratch):
        _drop_least_attended[(heads, batch)](
            position, released, over.view(torch.int8), recent, live, logits, total, order, scratch,
            *position.stride()[:2], heads, slots,
            G=total.shape[1] // heads, MEAN=mean, POOL=pool, TILE=TILE, num_warps=8,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["p_row", "p_head", "k_row", "k_head", "heads", "slots"],
    do_not_specialize_on_alignment=["released", "over", "first", "evicted"],
)
def _drop_oldest(
    position, released, over, first, key, raw, evicted, cos, sin,
    p_row, p_head, k_row, k_head, heads, slots,
    S: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position += row * p_row + head * p_head
    begin = tl.load(first + row)
    n = tl.arange(0, TILE)
    best = tl.full([TILE], NEVER, tl.int64)
    for start in range(0, slots, TILE):
        at = start + n
        place = tl.load(position + at, mask=at < slots, other=-1).to(tl.int64)
        # the slot below the position: positions differ, so the slot decides nothing
        rank = tl.where((place >= begin) & (place >= 0), (place << 32) | at, NEVER)
        best = tl.minimum(best, rank)
    slot = tl.min(best, 0) & 0x7FFFFFFF
    slot = tl.minimum(slot, slots - 1)
    gone = tl.load(over + row) != 0
    tl.store(released + row * heads + head, slot)
    tl.store(position + slot, -1, mask=gone)
    if S > 0:
        before = tl.load(evicted + row)
        if before + gone.to(tl.int64) > 0:
            s, d = tl.arange(0, SP), tl.arange(0, HALF)
            inside = ((s < S) & (s < begin))[:, None] & (d < D // 2)[None, :]
            held = key + row * k_row + head * k_head + s[:, None] * D + d[None, :]
            kept = raw + ((row * heads + head) * S + s[:, None]) * D + d[None, :]
            moved = inside & (before > 0)
            low = tl.load(held, mask=inside & (before == 0), other=0.0)
            high = tl.load(held + D // 2, mask=inside & (before == 0), other=0.0)
            low = tl.where(moved, tl.load(kept, mask=moved, other=0.0), low)
            high = tl.where(moved, tl.load(kept + D // 2, mask=moved, other=0.0), high)
            tl.debug_barrier()  # several threads may hold the same element: read, then write
            tl.store(kept, low, mask=inside & (before == 0))
            tl.store(kept + D // 2, high, mask=inside & (before == 0))
            turn = row * D + d
            turned = d < D // 2
            cos_low = tl.load(cos + turn, mask=turned, other=0.0)[None, :]
            sin_low = tl.load(sin + turn, mask=turned, other=0.0)[None, :]
            cos_high = tl.load(cos + turn + D // 2, mask=turned, other=0.0)[None, :]
            sin_high = tl.load(sin + turn + D // 2, mask=turned, other=0.0)[None, :]
            low, high = low.to(tl.float32), high.to(tl.float32)
            kind = key.dtype.element_ty
            tl.store(held, (low * cos_low + (-high) * sin_low).to(kind), mask=inside)
            tl.store(held + D // 2, (high * cos_high + low * sin_high).to(kind), mask=inside)


@triton.jit
def _received(logits, total, pair, at, held, slots, G: tl.constexpr, MEAN: tl.constexpr):
    """Return what a group's queries give to slots; zero where nothing is held."""
    given = tl.zeros(at.shape, tl.float32)
    for g in tl.static_range(G):
        level = tl.load(total + pair * G + g)
        logit = tl.load(logits + (pair * G + g) * slots + at, mask=held, other=float("-inf"))
        given += tl.exp2(logit - level)
    given = tl.where(held, given, 0.0)
    if MEAN:
        given = given / G
    return given


@triton.jit(
    do_not_specialize=["p_row", "p_head", "heads", "slots"],
    do_not_specialize_on_alignment=["released", "over", "recent", "tokens", "logits", "total"],
)
def _drop_smallest_sum(
    position, released, over, recent, tokens, logits, total, score,
    p_row, p_head, heads, slots,
    G: tl.constexpr, MEAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = row * heads + head
    position += row * p_row + head * p_head
    score += pair * slots
    last = tl.load(tokens + row)
    end = last - tl.load(recent + row)
    n = tl.arange(0, TILE)
    best = tl.full([TILE], NEVER, tl.int64)
    where = tl.zeros([TILE], tl.int32)
    for start in range(0, slots, TILE):
        at = start + n
        place = tl.load(position + at, mask=at < slots, other=-1).to(tl.int64)
        held = place >= 0
        before = tl.load(score + at, mask=held & (place != last), other=0.0)
        now = before + _received(logits, total, pair, at, held, slots, G, MEAN)
        tl.debug_barrier()  # several threads may hold the same element: read, then write
        tl.store(score + at, now, mask=held)
        # scores are not negative, so their bits order as they do
        rank = (now.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0xFFFFFFFF - place)
        rank = tl.where(held & (place <= end), rank, NEVER)
        where = tl.where(rank < best, at, where)
        best = tl.minimum(best, rank)
    least = tl.min(best, 0)
    slot = tl.max(tl.where(best == least, where, 0), 0)  # ranks of entries that may go differ
    tl.store(released + pair, slot.to(tl.int64))
    tl.store(position + slot, -1, mask=tl.load(over + row) != 0)


@triton.jit(
    do_not_specialize=["p_row", "p_head", "heads", "slots"],
    do_not_specialize_on_alignment=[
        "released", "over", "recent", "live", "logits", "total", "scratch",
    ],
)  # fmt: skip
def _drop_least_attended(
    position, released, over, recent, live, logits, total, order, scratch,
    p_row, p_head, heads, slots,
    G: tl.constexpr, MEAN: tl.constexpr, POOL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = row * heads + head
    position += row * p_row + head * p_head
    order += pair * slots
    scratch += pair * slots
    held_now = (tl.load(live + row) + 1).to(tl.int32)
    end = held_now - tl.load(recent + row).to(tl.int32)
    n = tl.arange(0, TILE)
    for start in range(0, slots, TILE):
        at = start + n
        held = tl.load(position + at, mask=at < slots, other=-1) >= 0
        given = _received(logits, total, pair, at, held, slots, G, MEAN)
        tl.store(scratch + at, given, mask=at < slots)
    tl.debug_barrier()  # slots are read in another order than they were written in
    best = tl.full([TILE], NEVER, tl.int64)
    for start in range(0, end, TILE):
        rank = start + n
        given = tl.zeros([TILE], tl.float32)
        for step in tl.static_range(POOL):
            beside = rank + step - POOL // 2
            inside = (beside >= 0) & (beside < end)
            slot = tl.load(order + beside, mask=inside, other=0)
            given += tl.load(scratch + slot, mask=inside, other=0.0)
        given = given / POOL
        # averages are not negative, so their bits order as they do
        worth = given.to(tl.int32, bitcast=True).to(tl.int64) << 32
        worth |= 0xFFFFFFFF - rank.to(tl.int64)
        best = tl.minimum(best, tl.where(rank < end, worth, NEVER))
    chosen = (0xFFFFFFFF - (tl.min(best, 0) & 0xFFFFFFFF)).to(tl.int32)
    gone = tl.load(over + row) != 0
    chosen = tl.where(gone, chosen, 0)
    slot = tl.load(order + chosen)
    tl.store(released + pair, slot.to(tl.int64))
    tl.store(position + slot, -1, mask=gone)
    if gone:
        for start in range(chosen, held_now, TILE):
            rank = start + n
            following = tl.load(order + rank + 1, mask=rank + 1 < held_now, other=0)
            following = tl.where(rank + 1 < held_now, following, slot)
            tl.debug_barrier()  # a tile is read before it is written
            tl.store(order + rank, following, mask=rank < held_now)
            tl.debug_barrier()
