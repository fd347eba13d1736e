"""Write entries into a packed cache, in plain torch.

State follows from a row's number of tokens alone, so that any way of bringing them leaves the same
bytes: keys of whole windows are packed, and values of all but the newest R tokens.

Shapes: b rows, K key/value heads, N new tokens, D head_dim, Dk packed key channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache as once
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed
from kvdock_kivi.quantise import pack, quantise_keys, quantise_values

PIECE = 4096
"""Tokens quantised at a time: the float32 of a long prompt is never whole in memory."""


def narrowed(keys: Tensor, channels: Tensor | None) -> Tensor:
    """Return the packed channels of keys [b, K, N, D], those of int64 [b, K, Dk]."""
    if channels is None:
        return keys
    index = channels[:, :, None, :].expand(*keys.shape[:3], channels.shape[-1])
    return keys.gather(-1, index)


def extend(
    cache: Packed,
    geometry: Geometry,
    rows: slice,
    keys: Tensor,
    values: Tensor,
    start: int,
    channels: Tensor | None,
) -> None:
    """Put tokens [b, K, N, D] behind the ``start`` ones that these rows hold."""
    end, residual = start + keys.shape[2], geometry.residual
    packed, first = geometry.key_tokens(start), geometry.value_tokens(start)
    if start > packed:
        keys = torch.cat([_newest(cache.key_rest[rows], packed, start, residual), keys], dim=2)
    if start > first:
        values = torch.cat([_newest(cache.value_rest[rows], first, start, residual), values], dim=2)
    whole, leaving = geometry.key_tokens(end), geometry.value_tokens(end)
    if whole > packed:
        write_keys(cache, geometry, rows, keys[:, :, : whole - packed], packed, channels)
    if leaving > first:
        write_values(cache, geometry, rows, values[:, :, : leaving - first], first)
    for rest, states, begin in (
        (cache.key_rest, keys[:, :, whole - packed :], whole),
        (cache.value_rest, values[:, :, leaving - first :], leaving),
    ):
        slots = torch.arange(begin, end, device=keys.device) % residual
        rest[rows, :, slots] = states


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
    kernels = kernels_for(keys)
    if kernels is not None:
        kernels.write_keys(cache, geometry, rows, keys, at, channels)
        return
    chosen = None if channels is None else channels[rows]
    step = -(-PIECE // geometry.residual) * geometry.residual
    for begin in range(0, keys.shape[2], step):
        part = narrowed(keys[:, :, begin : begin + step], chosen)
        codes, scale, zero = quantise_keys(part, geometry)
        words = pack(codes, geometry)
        block, group = (at + begin) // geometry.block, (at + begin) // geometry.group
        cache.key_codes[rows, :, block : block + words.shape[2]] = words
        cache.key_scale[rows, :, group : group + scale.shape[2]] = scale
        cache.key_zero[rows, :, group : group + scale.shape[2]] = zero


def write_values(cache: Packed, geometry: Geometry, rows: slice, values: Tensor, at: int) -> None:
    """Pack values [b, K, N, D] from token ``at`` on, beside those that share its block."""
    kernels = kernels_for(values)
    if kernels is not None:
        kernels.write_values(cache, geometry, rows, values, at)
        return
    for begin in range(0, values.shape[2], PIECE):
        _write_values(cache, geometry, rows, values[:, :, begin : begin + PIECE], at + begin)


def _write_values(cache: Packed, geometry: Geometry, rows: slice, values: Tensor, at: int) -> None:
    block = geometry.block
    before = at % block
    after = -(before + values.shape[2]) % block
    parts = quantise_values(values, geometry)
    codes, scale, zero = (F.pad(part, (0, 0, before, after)) for part in parts)
    words = pack(codes, geometry)
    where = slice(at // block, at // block + words.shape[2])
    cache.value_codes[rows, :, where] |= words  # places that are not taken hold zeros
    cache.value_scale[rows, :, where] += scale.unflatten(2, (-1, block)).mT
    cache.value_zero[rows, :, where] += zero.unflatten(2, (-1, block)).mT


def append_token(
    cache: Packed,
    geometry: Geometry,
    key: Tensor,
    value: Tensor,
    parts: Iterable[tuple[slice, int]],
    lengths: Tensor,
) -> None:
    """Put one token per row, [B, K, 1, D], into the residual; pack the value that it displaces.

    Args:
        parts: equally long rows, and how many tokens they hold. lengths: the same, int32 [B].
    """
    kernels = kernels_for(key)
    if kernels is not None:
        kernels.append_token(cache, geometry, key, value, lengths)
        return
    for rows, length in parts:
        slot = length % geometry.residual
        if length >= geometry.residual:
            oldest = cache.value_rest[rows, :, slot : slot + 1]
            _write_values(cache, geometry, rows, oldest, length - geometry.residual)
        cache.key_rest[rows, :, slot] = key[rows, :, 0]
        cache.value_rest[rows, :, slot] = value[rows, :, 0]


def flush_keys(
    cache: Packed, geometry: Geometry, rows: slice, length: int, channels: Tensor | None
) -> None:
    """Pack the window of keys that ends at token ``length``."""
    start = length - geometry.residual  # a multiple of R: the window lies in order
    write_keys(cache, geometry, rows, cache.key_rest[rows], start, channels)


def _newest(rest: Tensor, begin: int, end: int, residual: int) -> Tensor:
    """Return tokens ``begin … end`` of the residual, in order."""
    return rest[:, :, torch.arange(begin, end, device=rest.device) % residual]


def kernels_for(states: Tensor) -> ModuleType | None:
    """Return the module of the Triton kernels where they serve, on an NVIDIA GPU."""
    return _kernels() if states.is_cuda and states.shape[-1] <= 256 else None


@once
def _kernels() -> ModuleType | None:
    try:
        from kvdock_kivi import kernels
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return kernels
