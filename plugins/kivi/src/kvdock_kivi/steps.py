"""Decode steps over a packed cache in fixed shapes: lengths are read from the device.

What depends on a row's length is computed for every row and written where it applies, in Triton on
an NVIDIA GPU and else in plain torch. The bytes are those of `writing`.

Shapes: B rows, K key/value heads, H query heads, D head_dim, Dk packed key channels, Dv value
channels, R residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.policy import AttentionParams
from kvdock.storage import FixedSteps
from kvdock_kivi import attention, writing
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed
from kvdock_kivi.quantise import pack, quantise_keys, quantise_values


class KiviSteps(FixedSteps):
    """Append to and attend over one layer's packed cache.

    Args:
        channels: the packed key channels, int64 [B, K, Dk]; None for all of them.
        table: of positions, int32 [B, K, capacity]; None where they follow from the lengths.
        capacity: most entries of a row.
    """

    def __init__(
        self,
        cache: Packed,
        geometry: Geometry,
        channels: Tensor | None,
        table: Tensor | None,
        capacity: int,
    ) -> None:
        self._cache, self._geometry = cache, geometry
        self._channels, self._table, self._capacity = channels, table, capacity
        batch, device = cache.key_codes.shape[0], cache.key_codes.device
        self._rows = torch.arange(batch, dtype=torch.int32, device=device)

    def append(self, key: Tensor, value: Tensor, positions: Tensor, lengths: Tensor) -> None:
        """Put the tokens into the residual; pack the values that they displace."""
        kernels = writing.kernels_for(key)
        if kernels is not None:
            kernels.append_token(self._cache, self._geometry, key, value, lengths)
        else:
            append_token(self._cache, self._geometry, key, value, lengths)
        if self._table is not None:
            slot = lengths.long()[:, None, None].expand(-1, self._table.shape[1], 1)
            self._table.scatter_(2, slot, positions.int()[:, None, None].expand_as(slot))

    def attend(self, query: Tensor, lengths: Tensor, params: AttentionParams) -> Tensor:
        """Attend, then pack the windows of keys that the step completed."""
        cache, geometry = self._cache, self._geometry
        narrow = query
        if self._channels is not None:
            group = query.shape[1] // self._channels.shape[1]
            narrow = writing.narrowed(query, self._channels.repeat_interleave(group, dim=1))
        kernels = attention.kernel_for(query)
        if kernels is not None:
            output, _ = kernels.attend(
                cache, geometry, query, narrow, self._rows, lengths, self._capacity,
                params.scaling, held=1, dtype=query.dtype,
            )  # fmt: skip
        else:
            output = attention.fixed_attend(cache, geometry, query, narrow, lengths, params.scaling)
        kernels = writing.kernels_for(query)
        if kernels is not None:
            kernels.flush_keys(cache, geometry, lengths, self._channels)
        else:
            flush_keys(cache, geometry, lengths, self._channels)
        return output.to(query.dtype).transpose(1, 2)


def append_token(
    cache: Packed, geometry: Geometry, key: Tensor, value: Tensor, lengths: Tensor
) -> None:
    """Put one token per row, [B, K, 1, D], behind ``lengths`` others, int32 [B]."""
    lengths = lengths.long()
    slot = (lengths % geometry.residual)[:, None, None, None]
    if cache.value_codes.shape[2]:  # else no row ever holds more than the residual
        oldest = cache.value_rest.gather(2, slot.expand_as(value))
        _write_value(cache, geometry, oldest, lengths - geometry.residual)
    cache.key_rest.scatter_(2, slot.expand_as(key), key)
    cache.value_rest.scatter_(2, slot.expand_as(value), value)


def _write_value(cache: Packed, geometry: Geometry, values: Tensor, tokens: Tensor) -> None:
    """Pack one value per row, [B, K, 1, Dv], as ``tokens``, int64 [B]; none where that is < 0."""
    leaves = (tokens >= 0)[:, None, None]
    tokens = tokens.clamp_min(0)
    block, offset = tokens // geometry.block, tokens % geometry.block
    codes, scale, zero = quantise_values(values, geometry)
    shift = (geometry.bits * (offset // geometry.plane)).int()
    words = cache.value_codes.flatten(2, 3)
    at = (block * geometry.plane + offset % geometry.plane)[:, None, None, None].expand_as(codes)
    old = words.gather(2, at)
    both = (old.int() | (codes.int() << shift[:, None, None, None])).to(torch.int16)
    words.scatter_(2, at, torch.where(leaves[..., None], both, old))
    groups = torch.arange(scale.shape[-1], device=tokens.device)
    side = (block[:, None] * scale.shape[-1] + groups) * geometry.block + offset[:, None]
    side = side[:, None].expand(-1, values.shape[1], -1)
    for target, new in ((cache.value_scale, scale), (cache.value_zero, zero)):
        flat = target.flatten(2)
        flat.scatter_(2, side, torch.where(leaves, new[:, :, 0], flat.gather(2, side)))


def flush_keys(cache: Packed, geometry: Geometry, lengths: Tensor, channels: Tensor | None) -> None:
    """Pack the last window of keys in the rows whose ``lengths``, int32 [B], complete one."""
    if not cache.key_codes.shape[2]:
        return
    lengths = lengths.long()
    full = (lengths % geometry.residual == 0)[:, None, None, None]
    window = (lengths // geometry.residual - 1).clamp_min(0)[:, None]
    keys = writing.narrowed(cache.key_rest, channels)
    codes, scale, zero = quantise_keys(keys, geometry)
    targets = (cache.key_codes, cache.key_scale, cache.key_zero)
    for target, new in zip(targets, (pack(codes, geometry), scale, zero), strict=True):
        places = window * new.shape[2] + torch.arange(new.shape[2], device=window.device)
        at = places[:, None, :, None].expand(*new.shape[:3], 1)
        at = (at[..., None] if new.dim() == 5 else at).expand_as(new)
        keep = full[..., None] if new.dim() == 5 else full
        target.scatter_(2, at, torch.where(keep, new, target.gather(2, at)))
