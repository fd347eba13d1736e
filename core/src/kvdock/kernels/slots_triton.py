"""Attention of one query per row over slots of fixed number, split among programs, in Triton.

The grid knows physical shapes only; how far a row's slots are filled is read on the device, and a
program beyond that leaves at once. The program of a row and head that arrives last merges what the
others found, so a step is one launch.

Shapes: B rows, H query heads, K key/value heads, G = H/K, N physical slots, D head_dim, S splits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202, SIM102  (a kernel's arguments are the compiler's, not Python's)

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvdock.kernels.overlap import launch, let_next_start, wait_for_previous
from kvdock.kernels.split_kv import multiprocessors
from kvdock.policy import AttentionParams

LOG2E = tl.constexpr(math.log2(math.e))
MERGED = 2048
"""Elements of partial results that a warp takes at a time when it merges."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Say how the slots are cut: entries of a tile, warps, pipeline depth, programs per processor.

    Args:
        share: most programs per multiprocessor that a row's slots are split for.
    """

    tile: int = 64
    warps: int = 4
    stages: int = 3
    share: int = 1


def default_tuning(rows: int, slots: int) -> Tuning:
    """Return what was fastest on an H100 for pairs of a row and a key/value head."""
    return Tuning() if rows * slots <= 200_000 else Tuning(warps=2)


def chunk_size(rows: int, slots: int, processors: int, tuning: Tuning) -> int:
    """Return the slots of one program, a power of two of tiles.

    It stays the same while a cache grows, but for a few lengths, and with it every rounding.

    Args:
        rows: pairs of a row and a key/value head.
    """
    tiles = -(-slots // tuning.tile) * rows
    each = -(-tiles // (processors * tuning.share))
    return int(tuning.tile * triton.next_power_of_2(each))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    arrived: Tensor,
    *,
    position: Tensor | None = None,
    used: Tensor | None = None,
    told: tuple[Tensor, Tensor] | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attend over the filled slots, without a mask and without asking the device.

    Args:
        query: [B, H, 1, D]. key, value: [B, K, N, D], [B, K, N, Dv].
        arrived: int32 [B · K], zero before and after; calls that may overlap need one each.
        position: int32 [B, K, N], −1 = empty; None where only ``used`` tells.
        used: int64 [B]: nothing is filled beyond a row's first ``used + 1`` slots.
        told: where to write the logits of the slots that are looked at and their log-sum-exps,
            both in base 2, float32 [B, H, N] and [B, H].

    Returns:
        [B, 1, H, Dv], contiguous; zeros for a row without entries.
    """
    batch, heads, _, dim = query.shape
    kv_heads, slots, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    query, key, value = (_lined(states) for states in (query, key, value))
    rows, group = batch * kv_heads, heads // kv_heads
    tuning = tuning or default_tuning(rows, slots)
    group_pad, value_pad = triton.next_power_of_2(group), _padded(value_dim)
    chunk = chunk_size(rows, slots, multiprocessors(query.device), tuning)
    splits = triton.cdiv(slots, chunk)
    # the interpreter's NumPy knows no bfloat16
    upcast = query.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    output = query.new_empty(
        batch, 1, heads, value_dim, dtype=torch.float32 if upcast else query.dtype
    )
    partial = query.new_empty(rows, splits, group, value_dim, dtype=torch.float32)
    level = query.new_empty(rows, splits, group, dtype=torch.float32)
    places = arrived if position is None else position
    logits, total = (level, level) if told is None else told
    with torch.cuda.device_of(query):
        _attend[(splits, rows)](
            query, key, value, places, arrived if used is None else used,
            arrived if params.sinks is None else params.sinks, output, partial, level, arrived,
            logits, total, *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            *((0, 0) if position is None else position.stride()[:2]),
            kv_heads, slots, chunk, splits, params.scaling * LOG2E.value,
            0.0 if params.softcap is None else params.softcap * LOG2E.value,
            G=group, GP=group_pad, M=max(16, group_pad),
            D=dim, DP=_padded(dim), DV=value_dim, DVP=value_pad, TILE=tuning.tile,
            HOLES=position is not None, ENDS=used is not None, SINKS=params.sinks is not None,
            CAPPED=params.softcap is not None, UPCAST=upcast, TELLS=told is not None,
            SOME=max(1, MERGED * tuning.warps // (group_pad * value_pad)), STAGES=tuning.stages,
            num_warps=tuning.warps, num_stages=tuning.stages, **launch(query.device),
        )  # fmt: skip
    return output.to(query.dtype)


def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _lined(states: Tensor) -> Tensor:
    """Return states whose channels lie side by side, as the kernel's loads assume."""
    return states if states.stride(-1) == 1 else states.contiguous()


@triton.jit
def _merge(partial, level, splits, G: tl.constexpr, GP: tl.constexpr, DV: tl.constexpr,
           DVP: tl.constexpr, SOME: tl.constexpr):  # fmt: skip
    """Merge the splits of one row and head, [GP, DVP], and their levels, some at a time."""
    s, g, d = tl.arange(0, SOME), tl.arange(0, GP), tl.arange(0, DVP)
    top = tl.full([GP], float("-inf"), tl.float32)
    mass = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DVP], tl.float32)
    for first in tl.range(0, splits, SOME, num_stages=1):
        index = (first + s)[:, None] * G + g[None, :]
        there = (first + s < splits)[:, None] & (g < G)[None, :]
        # past the first-level cache, which does not see what other processors wrote
        found = tl.load(level + index, mask=there, other=float("-inf"), cache_modifier=".cg")
        wide = (index * DV)[:, :, None] + d[None, None, :]
        part = tl.load(
            partial + wide, mask=there[:, :, None] & (d < DV)[None, None, :], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(found, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, fade = tl.exp2(found - base[None, :]), tl.exp2(top - base)
        mass = mass * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = higher
    return acc / tl.where(mass > 0, mass, 1.0)[:, None], top + tl.log2(tl.maximum(mass, 1e-30))


@triton.jit(
    do_not_specialize=["p_batch", "p_head", "kv_heads", "slots", "chunk", "splits"],
    # rows of tables of all layers: aligned in some layers and not in others
    do_not_specialize_on_alignment=["used", "told", "total"],
)
def _attend(
    query, key, value, position, used, sinks, output, partial, level, arrived, told, total,
    q_batch, q_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot, p_batch, p_head,
    kv_heads, slots, chunk, splits, scale, cap,
    G: tl.constexpr, GP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, TILE: tl.constexpr, HOLES: tl.constexpr,
    ENDS: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
    TELLS: tl.constexpr, SOME: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend over one chunk of one row's slots with the query heads of one key/value head.

    Args (beside strides and pointers):
        scale: of the logits, times log2(e). cap: of the scaled logits, times log2(e).
    """
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    split, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    end = slots
    if ENDS:
        end = tl.minimum(tl.load(used + batch) + 1, slots).to(tl.int32)
    begin = split * chunk
    if begin < end:
        m, d, dv = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP)
        real = m < G
        q_at = query + batch * q_batch + (head * G + m[:, None]) * q_head + d[None, :]
        q = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        k_at = key + batch * k_batch + head * k_head + d[:, None]
        v_at = value + batch * v_batch + head * v_head + dv[None, :]
        p_at = position + batch * p_batch + head * p_head
        top = tl.full([M], float("-inf"), tl.float32)
        mass = tl.zeros([M], tl.float32)
        if SINKS:  # a sink is an entry without a value, the first program's
            if split == 0:
                top = tl.load(sinks + head * G + m, mask=real, other=0.0).to(tl.float32)
                top, mass = top * LOG2E, mass + 1.0
        acc = tl.zeros([M, DVP], tl.float32)
        stop = tl.minimum(begin + chunk, end)
        for start in tl.range(begin, stop, TILE, num_stages=STAGES):
            n = start + tl.arange(0, TILE)
            inside = n < stop
            held, wanted = inside, inside
            if HOLES:
                held = tl.load(p_at + n, mask=inside, other=-1) >= 0
                if not ENDS:
                    wanted = held
            k = tl.load(
                k_at + n[None, :] * k_slot, mask=wanted[None, :] & (d < D)[:, None], other=0.0
            )
            v = tl.load(
                v_at + n[:, None] * v_slot, mask=wanted[:, None] & (dv < DV)[None, :], other=0.0
            )
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            logits = tl.dot(q, k, input_precision="ieee") * scale
            if CAPPED:  # cap · tanh(logits / cap)
                logits = cap - 2 * cap / (1 + tl.exp2(logits * (2 * LOG2E) / cap))
            logits = tl.where(held[None, :], logits, float("-inf"))
            if TELLS:
                tell = told + (pair.to(tl.int64) * G + m[:, None]) * slots + n[None, :]
                tl.store(tell, logits, mask=real[:, None] & inside[None, :])
            higher = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p, fade = tl.exp2(logits - base[:, None]), tl.exp2(top - base)
            mass = mass * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            top = higher
        acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
        out_at = output + (batch * kv_heads + head) * G * DV
        arriving = tl.cdiv(end, chunk)
        if arriving == 1:
            writes = real[:, None] & (dv < DV)[None, :]
            tl.store(
                out_at + m[:, None] * DV + dv[None, :], acc.to(output.dtype.element_ty), mask=writes
            )
            if TELLS:
                tl.store(total + pair * G + m, top + tl.log2(tl.maximum(mass, 1e-30)), mask=real)
        else:
            first = pair.to(tl.int64) * splits * G
            row = first + split * G + m
            writes = real[:, None] & (dv < DV)[None, :]
            tl.store(partial + row[:, None] * DV + dv[None, :], acc, mask=writes)
            tl.store(level + row, top + tl.log2(tl.maximum(mass, 1e-30)), mask=real)
            tl.debug_barrier()  # all threads have written before one says so
            if tl.atomic_add(arrived + pair, 1) == arriving - 1:
                tl.store(arrived + pair, 0)
                merged, whole = _merge(
                    partial + first * DV, level + first, arriving, G, GP, DV, DVP, SOME
                )
                g = tl.arange(0, GP)
                tl.store(
                    out_at + g[:, None] * DV + dv[None, :], merged.to(output.dtype.element_ty),
                    mask=(g < G)[:, None] & (dv < DV)[None, :],
                )  # fmt: skip
                if TELLS:
                    tl.store(total + pair * G + g, whole, mask=g < G)
