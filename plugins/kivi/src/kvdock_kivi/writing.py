"""Write entries into a packed cache, in plain torch.

State follows from a row's number of tokens alone, so that any way of bringing them leaves the same
bytes: keys of whole windows are packed, and values of all but the newest R tokens.

Shapes: b rows, K key/value heads, N new tokens, D head_dim, Dk packed key channels.
"""

from __future__ import annotations

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
    keys = torch.cat([_newest(cache.key_rest[rows], packed, start, residual), keys], dim=2)
    values = torch.cat([_newest(cache.value_rest[rows], first, start, residual), values], dim=2)
    whole = geometry.key_tokens(end)
    step = -(-PIECE // residual) * residual
    for at in range(packed, whole, step):
        part = keys[:, :, at - packed : min(at + step, whole) - packed]
        write_keys(cache, geometry, rows, narrowed(part, channels), at)
    leaving = geometry.value_tokens(end)
    step = -(-PIECE // geometry.block) * geometry.block
    at = first
    while at < leaving:
        stop = min(at // geometry.block * geometry.block + step, leaving)
        write_values(cache, geometry, rows, values[:, :, at - first : stop - first], at)
        at = stop
    for rest, states, begin in (
        (cache.key_rest, keys[:, :, whole - packed :], whole),
        (cache.value_rest, values[:, :, leaving - first :], leaving),
    ):
        slots = torch.arange(begin, end, device=keys.device) % residual
        rest[rows, :, slots] = states


def write_keys(cache: Packed, geometry: Geometry, rows: slice, keys: Tensor, at: int) -> None:
    """Pack the keys of whole windows, [b, K, m·R, Dk], from token ``at`` on."""
    codes, scale, zero = quantise_keys(keys, geometry)
    words = pack(codes, geometry)
    block, group = at // geometry.block, at // geometry.group
    cache.key_codes[rows, :, block : block + words.shape[2]] = words
    cache.key_scale[rows, :, group : group + scale.shape[2]] = scale
    cache.key_zero[rows, :, group : group + scale.shape[2]] = zero


def write_values(cache: Packed, geometry: Geometry, rows: slice, values: Tensor, at: int) -> None:
    """Pack values [b, K, N, D] from token ``at`` on, beside those that share its block."""
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


def flush_keys(
    cache: Packed, geometry: Geometry, rows: slice, length: int, channels: Tensor | None
) -> None:
    """Pack the window of keys that ends at token ``length``."""
    start = length - geometry.residual
    keys = _newest(cache.key_rest[rows], start, length, geometry.residual)
    write_keys(cache, geometry, rows, narrowed(keys, channels), start)


def _newest(rest: Tensor, begin: int, end: int, residual: int) -> Tensor:
    """Return tokens ``begin … end`` of the residual, in order."""
    return rest[:, :, torch.arange(begin, end, device=rest.device) % residual]
