"""The small operations of a decode step, and of a long prompt, each as one Triton kernel.

Every kernel rounds where the separate operations of a transformers model round, so that results
differ from theirs at most by the order of a sum and the last bit of an exponential.

Shapes: R rows (tokens, or tokens times heads), C channels, B rows of the batch, H query heads,
K key/value heads, D head_dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvdock.kernels.overlap import launch, let_next_start, wait_for_previous

EXACT = {"enable_fp_fusion": False}
"""No product and sum in one rounding: the model's operations do not fuse them either."""


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight · (states / root mean square), over the last dimension."""
    states = states.contiguous()
    return _normed(states, states, None, weight, eps)


def add_rms_norm(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum of two states and its norm."""
    left, right = left.contiguous(), right.contiguous()
    total = torch.empty_like(left)
    return total, _normed(left, right, total, weight, eps)


def _normed(
    left: Tensor, right: Tensor, total: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    output, channels = torch.empty_like(left), left.shape[-1]
    block = int(triton.next_power_of_2(channels))
    with torch.cuda.device_of(left):
        _rms_norm[(left.numel() // channels,)](
            left, right, output if total is None else total, weight, output, channels, eps,
            BLOCK=block, ADD=total is not None, num_warps=min(16, max(1, block // 512)),
            **launch(left.device), **EXACT,
        )  # fmt: skip
    return output


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) · up for [..., C]; leading dimensions must be as if contiguous."""
    channels = gate.shape[-1]
    rows, block = gate.numel() // channels, 1024
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):
        _gated[(rows, triton.cdiv(channels, block))](
            gate, up, output, gate.stride(-2), up.stride(-2), channels,
            BLOCK=block, num_warps=4, **launch(gate.device), **EXACT,
        )  # fmt: skip
    return output


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn one token's queries and keys by its position, halves against each other.

    Args:
        query: [B, 1, H, D]. key: [B, 1, K, D]. cos, sin: [B, 1, D] or [1, 1, D].

    Returns:
        [B, H, 1, D] and [B, K, 1, D].
    """
    query, key, cos, sin = (states.contiguous() for states in (query, key, cos, sin))
    batch, _, heads, dim = query.shape
    kv_heads = key.shape[2]
    turned_query, turned_key = torch.empty_like(query), torch.empty_like(key)
    half = int(triton.next_power_of_2(dim // 2))
    with torch.cuda.device_of(query):
        _rotate[(heads + kv_heads, batch)](
            query, key, cos, sin, turned_query, turned_key, heads, kv_heads,
            dim if cos.shape[0] > 1 else 0, D=dim, HALF=half, num_warps=1, **launch(query.device),
            **EXACT,
        )  # fmt: skip
    return turned_query.transpose(1, 2), turned_key.transpose(1, 2)


def append(
    table: tuple[Tensor, Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    used: Tensor,
    released: Tensor | None,
    hole: Tensor | None,
) -> None:
    """Write one token per row into keys, values and positions; see `slots.append_slots`."""
    keys, values, positions = table
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, _, dim = key.shape
    value_dim = value.shape[-1]
    with torch.cuda.device_of(key):
        _append[(heads, batch)](
            keys, values, positions, key, value, tokens, used,
            used if released is None else released, used if hole is None else hole.view(torch.int8),
            *keys.stride()[:2], *values.stride()[:2], *positions.stride()[:2],
            *key.stride()[:2], *value.stride()[:2], heads, D=dim,
            DP=int(triton.next_power_of_2(dim)), DV=value_dim,
            DVP=int(triton.next_power_of_2(value_dim)), HOLES=hole is not None, num_warps=1,
            **launch(key.device),
        )  # fmt: skip


@triton.jit
def _rms_norm(
    left, right, total, weight, output, channels, eps,
    BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    at = tl.program_id(0).to(tl.int64) * channels
    c = tl.arange(0, BLOCK)
    inside = c < channels
    kind = output.dtype.element_ty
    factor = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    states = tl.load(left + at + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        states += tl.load(right + at + c, mask=inside, other=0.0).to(tl.float32)
        rounded = states.to(kind)
        tl.store(total + at + c, rounded, mask=inside)
        states = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states, 0) * (1.0 / channels) + eps)
    unit = (states * scale).to(kind).to(tl.float32)
    tl.store(output + at + c, (factor * unit).to(kind), mask=inside)


@triton.jit
def _gated(
    gate, up, output, gate_row, up_row, channels, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    kind = output.dtype.element_ty
    opening = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    states = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    opening = (opening / (1.0 + tl.exp(-opening))).to(kind).to(tl.float32)
    tl.store(output + row * channels + c, (opening * states).to(kind), mask=inside)


@triton.jit
def _rotate(
    query, key, cos, sin, turned_query, turned_key, heads, kv_heads, turn_row,
    D: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kind = turned_query.dtype.element_ty
    d = tl.arange(0, HALF)
    inside = d < D // 2
    if head < heads:
        source = query + (row * heads + head) * D
        target = turned_query + (row * heads + head) * D
    else:
        source = key + (row * kv_heads + head - heads) * D
        target = turned_key + (row * kv_heads + head - heads) * D
    low = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + D // 2 + d, mask=inside, other=0.0).to(tl.float32)
    cos += row * turn_row
    sin += row * turn_row
    cos_low = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + D // 2 + d, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + D // 2 + d, mask=inside, other=0.0).to(tl.float32)
    straight = (low * cos_low).to(kind).to(tl.float32)
    across = (-high * sin_low).to(kind).to(tl.float32)
    tl.store(target + d, (straight + across).to(kind), mask=inside)
    straight = (high * cos_high).to(kind).to(tl.float32)
    across = (low * sin_high).to(kind).to(tl.float32)
    tl.store(target + D // 2 + d, (straight + across).to(kind), mask=inside)


@triton.jit(
    do_not_specialize=["keys_batch", "keys_head", "values_batch", "values_head",
                       "positions_batch", "positions_head", "heads"],
    # rows of tables of all layers: aligned in some layers and not in others
    do_not_specialize_on_alignment=["tokens", "used", "released", "hole"],
)  # fmt: skip
def _append(
    keys, values, positions, key, value, tokens, used, released, hole,
    keys_batch, keys_head, values_batch, values_head, positions_batch, positions_head,
    key_batch, key_head, value_batch, value_head, heads,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, HOLES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(used + row)
    if HOLES:
        given_up = tl.load(released + row * heads + head)
        slot = tl.where(tl.load(hole + row) != 0, given_up, slot)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    from_key = tl.load(key + row * key_batch + head * key_head + d, mask=d < D)
    tl.store(keys + row * keys_batch + head * keys_head + slot * D + d, from_key, mask=d < D)
    from_value = tl.load(value + row * value_batch + head * value_head + dv, mask=dv < DV)
    at = values + row * values_batch + head * values_head + slot * DV + dv
    tl.store(at, from_value, mask=dv < DV)
    token = tl.load(tokens + row).to(tl.int32)
    tl.store(positions + row * positions_batch + head * positions_head + slot, token)
