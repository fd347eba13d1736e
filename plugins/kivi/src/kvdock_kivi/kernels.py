"""Launch the Triton kernels of a packed cache."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kvdock.kernels.split_kv import merge_splits, multiprocessors, split_count
from kvdock_kivi import pack_kernel
from kvdock_kivi.decode_kernel import packed_attention
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed

LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Say how a program is cut: warps, pipeline depth, programs on a multiprocessor, registers."""

    warps: int = 1
    stages: int = 2
    resident: int = 8
    registers: int | None = None


PAST = Tuning(warps=4, stages=2, resident=1)


def decode_tuning(bits: int, rows: int, tokens: int) -> Tuning:
    """Return what was fastest on an H100.

    Args:
        rows: pairs of a row and a key/value head. tokens: of the longest row.
    """
    if rows < 32:
        return Tuning(warps=2, stages=3 if bits == 2 else 2, resident=4)
    if bits == 2:
        return Tuning(warps=1, resident=32 if tokens > 65_536 else 16)
    return Tuning(warps=2, stages=3)


def attend(
    cache: Packed,
    geometry: Geometry,
    query: Tensor,
    narrow: Tensor,
    rows: Tensor,
    lengths: Tensor,
    longest: int,
    scaling: float,
    *,
    held: int,
    dtype: torch.dtype = torch.float32,
    tuning: Tuning | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with Q queries per head over all entries of some rows, without a mask.

    Args:
        query: [b, H, Q, D]. narrow: its channels that are packed, [b, H, Q, Dk].
        rows: int32 [b], their rows in the cache. lengths: tokens of every row, int32 [B].
        longest: the most tokens of a row. held: 1 while the newest token's window is not packed.

    Returns:
        [b, H, Q, Dv] in ``dtype``, and natural log-sum-exps, float32 [b, H, Q].
    """
    b, heads, queries, dim = query.shape
    kv_heads, key_dim = cache.key_codes.shape[1], cache.key_codes.shape[-1]
    value_dim = cache.value_codes.shape[-1]
    count = heads // kv_heads * queries
    repeat = value_dim // geometry.group
    m = 64 if count > 16 else max(16, triton.next_power_of_2(count * repeat))
    if tuning is None:
        tuning = decode_tuning(geometry.bits, b * kv_heads, longest) if count <= 16 else PAST
    if m > 64:
        m = 64
    parts = triton.cdiv(count * repeat, m)
    packed = geometry.value_tokens(longest)
    if splits is None:
        splits = split_count(
            b * kv_heads * parts, multiprocessors(query.device), packed,
            tile=geometry.block, resident=tuning.resident, most=256,
        )  # fmt: skip
    query, narrow = _rows_contiguous(query), _rows_contiguous(narrow)
    out = query.new_empty(b, kv_heads, splits + 1, count, value_dim, dtype=torch.float32)
    lse = query.new_empty(b, kv_heads, splits + 1, count, dtype=torch.float32)
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    with torch.cuda.device_of(query):
        packed_attention[(splits + 1, b * kv_heads, parts)](
            query, narrow, cache.key_codes, cache.key_scale, cache.key_zero,
            cache.value_codes, cache.value_scale, cache.value_zero,
            cache.key_rest, cache.value_rest, rows, lengths, out, lse,
            *query.stride()[:3], *narrow.stride()[:3], kv_heads, queries, count, splits,
            _windows(cache, geometry),
            cache.value_codes.shape[2], cache.key_rest.shape[2], scaling * LOG2E, held,
            D=dim, DP=_padded(dim), DK=key_dim, DKP=_padded(key_dim),
            DV=value_dim, DVP=_padded(value_dim), M=m, REPEAT=repeat, BITS=geometry.bits,
            G=geometry.group, R=geometry.residual, N=geometry.plane,
            ROWS=max(16, geometry.plane),
            COLUMNS=max(8, triton.next_power_of_2(repeat + 1)), FINE=queries > 1,
            INTERPRET=interpret, UPCAST=interpret and query.dtype == torch.bfloat16,
            STAGES=tuning.stages, num_warps=tuning.warps, num_stages=tuning.stages,
            maxnreg=tuning.registers,
        )  # fmt: skip
    merged, total = merge_splits(out, lse, dtype)
    return merged.reshape(b, heads, queries, value_dim), total.reshape(b, heads, queries)


def write_keys(
    cache: Packed,
    geometry: Geometry,
    rows: slice,
    keys: Tensor,
    at: int,
    channels: Tensor | None,
) -> None:
    """Pack the keys of whole windows, [b, K, m·R, D], from token ``at`` on.

    Args:
        channels: the packed channels of all rows, int64 [B, K, Dk]; None for all of them.
    """
    b, kv_heads, tokens, _ = keys.shape
    keys, key_dim = _rows_contiguous(keys), cache.key_codes.shape[-1]
    with torch.cuda.device_of(keys):
        pack_kernel.pack_keys[(tokens // geometry.block, b * kv_heads)](
            keys, keys if channels is None else channels,
            cache.key_codes, cache.key_scale, cache.key_zero, *keys.stride()[:3],
            rows.start, at, kv_heads, _windows(cache, geometry),
            DK=key_dim, DKP=_padded(key_dim), NARROW=channels is not None, BITS=geometry.bits,
            G=geometry.group, R=geometry.residual, N=geometry.plane, num_warps=4,
        )  # fmt: skip


def write_values(cache: Packed, geometry: Geometry, rows: slice, values: Tensor, at: int) -> None:
    """Pack values [b, K, N, D] from token ``at`` on, beside those that share its block."""
    b, kv_heads, tokens, dim = values.shape
    values, block = _rows_contiguous(values), geometry.block
    blocks = triton.cdiv(at + tokens, block) - at // block
    with torch.cuda.device_of(values):
        pack_kernel.pack_values[(blocks, b * kv_heads)](
            values, cache.value_codes, cache.value_scale, cache.value_zero,
            *values.stride()[:3], rows.start, at, at + tokens, kv_heads,
            cache.value_codes.shape[2], D=dim, DP=_padded(dim), BITS=geometry.bits,
            G=geometry.group, N=geometry.plane, num_warps=4,
        )  # fmt: skip


def append_token(
    cache: Packed, geometry: Geometry, key: Tensor, value: Tensor, lengths: Tensor
) -> None:
    """Put one token per row, [B, K, 1, D], behind ``lengths`` others, int32 [B]."""
    b, kv_heads = key.shape[:2]
    key, value = _rows_contiguous(key), _rows_contiguous(value)
    dim, value_dim = key.shape[-1], value.shape[-1]
    with torch.cuda.device_of(key):
        pack_kernel.append_token[(b * kv_heads,)](
            key, value, cache.key_rest, cache.value_rest, cache.value_codes, cache.value_scale,
            cache.value_zero, lengths, *key.stride()[:2], *value.stride()[:2], kv_heads,
            cache.value_codes.shape[2], cache.key_rest.shape[2],
            D=dim, DP=_padded(dim), DV=value_dim, DVP=_padded(value_dim), BITS=geometry.bits,
            G=geometry.group, R=geometry.residual, N=geometry.plane, num_warps=1,
        )  # fmt: skip


def flush_keys(cache: Packed, geometry: Geometry, lengths: Tensor, channels: Tensor | None) -> None:
    """Pack the last window of keys in the rows whose ``lengths``, int32 [B], complete one."""
    batch, kv_heads, rest, dim = cache.key_rest.shape
    if rest < geometry.residual:
        return  # there is no room for a whole window
    key_dim = cache.key_codes.shape[-1]
    with torch.cuda.device_of(cache.key_rest):
        pack_kernel.flush_keys[(geometry.residual // geometry.block, batch * kv_heads)](
            cache.key_rest, cache.key_rest if channels is None else channels,
            cache.key_codes, cache.key_scale, cache.key_zero, lengths, kv_heads,
            _windows(cache, geometry), D=dim, DK=key_dim, DKP=_padded(key_dim),
            NARROW=channels is not None, BITS=geometry.bits, G=geometry.group,
            R=geometry.residual, N=geometry.plane, num_warps=4,
        )  # fmt: skip


def _windows(cache: Packed, geometry: Geometry) -> int:
    """Return how many windows of keys have room in a row."""
    return cache.key_codes.shape[2] * geometry.block // geometry.residual


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _rows_contiguous(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
