"""Write a step's tokens into narrow and whole keys, in one Triton kernel.

Shapes: B rows, K key/value heads, D head_dim.
"""

# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvdock_think.attention import Entries


def append(entries: Entries, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    """Put one token per row, [B, K, 1, D], behind ``lengths`` others, int32 [B]."""
    batch, kv_heads, _, head_dim = key.shape
    keys, rest, values = entries.keys, entries.rest, entries.values
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    with torch.cuda.device_of(key):
        _append[(batch * kv_heads,)](
            key, value, entries.order, keys, rest, values, lengths,
            *key.stride()[:2], *value.stride()[:2], keys.stride(1), rest.stride(1),
            values.stride(1), kv_heads, rest.shape[2],
            HEAD_DIM=head_dim, KEPT=keys.shape[-1], D=triton.next_power_of_2(head_dim),
            VALUE_DIM=values.shape[-1], VALUE=triton.next_power_of_2(values.shape[-1]),
            num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _append(
    key, value, order, keys, rest, values, lengths, k_batch, k_head, v_batch, v_head,
    keys_head, rest_head, values_head, kv_heads, ring,
    HEAD_DIM: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Write the newest token of one row and key/value head."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    at = tl.load(lengths + batch).to(tl.int64)
    d, v = tl.arange(0, D), tl.arange(0, VALUE)
    real = d < HEAD_DIM
    channel = tl.load(order + pair * HEAD_DIM + d, mask=real, other=0)
    x = tl.load(key + batch * k_batch + head * k_head + channel, mask=real, other=0.0)
    tl.store(keys + pair * keys_head + at * KEPT + d, x, mask=d < KEPT)
    spot = rest + pair * rest_head + at % ring * (HEAD_DIM - KEPT)
    tl.store(spot + (d - KEPT), x, mask=real & (d >= KEPT))
    x = tl.load(value + batch * v_batch + head * v_head + v, mask=v < VALUE_DIM, other=0.0)
    tl.store(values + pair * values_head + at * VALUE_DIM + v, x, mask=v < VALUE_DIM)
