"""Attention over a packed cache: plain torch, or the Triton kernel where it serves.

Shapes: b rows, H query heads, K key/value heads, Q queries, N tokens of a tile, D head_dim, Dk
packed key channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed
from kvdock_kivi.quantise import dequantise_keys, dequantise_values, unpack
from kvdock_kivi.writing import kernels_for

TILE = 1024
"""Tokens dequantised at a time, about."""

Tile = tuple[Tensor, Tensor, bool]


def packed_keys(cache: Packed, geometry: Geometry, rows: slice, begin: int, end: int) -> Tensor:
    """Return keys ``begin … end``, float32 [b, K, N, Dk]; both are multiples of block and group."""
    blocks = slice(begin // geometry.block, end // geometry.block)
    groups = slice(begin // geometry.group, end // geometry.group)
    codes = unpack(cache.key_codes[rows, :, blocks], geometry)
    scale, zero = cache.key_scale[rows, :, groups], cache.key_zero[rows, :, groups]
    return dequantise_keys(codes, scale, zero, geometry.group)


def packed_values(cache: Packed, geometry: Geometry, rows: slice, begin: int, end: int) -> Tensor:
    """Return values ``begin … end``, float32 [b, K, N, D]; ``begin`` is a multiple of the block."""
    blocks = slice(begin // geometry.block, -(-end // geometry.block))
    codes = unpack(cache.value_codes[rows, :, blocks], geometry)
    scale, zero = (
        x[rows, :, blocks].mT.flatten(2, 3) for x in (cache.value_scale, cache.value_zero)
    )
    return dequantise_values(codes, scale, zero, geometry.group)[:, :, : end - begin]


def tiles(
    cache: Packed, geometry: Geometry, rows: slice, length: int, packed: int
) -> Iterator[Tile]:
    """Yield keys, values and whether the keys are narrow, over all tokens of equally long rows.

    Args:
        packed: tokens whose keys are packed.
    """
    residual, values = geometry.residual, geometry.value_tokens(length)
    slots = torch.arange(length, device=cache.key_rest.device) % residual
    step = -(-TILE // residual) * residual
    for begin in range(0, packed, step):
        end = min(begin + step, packed)
        keys = packed_keys(cache, geometry, rows, begin, end)
        middle = max(begin, min(end, values))
        parts = []
        if middle > begin:
            parts.append(packed_values(cache, geometry, rows, begin, middle))
        if end > middle:
            parts.append(cache.value_rest[rows, :, slots[middle:end]].float())
        yield keys, torch.cat(parts, dim=2), True
    if packed < length:
        keys, values_ = (x[rows, :, slots[packed:]] for x in (cache.key_rest, cache.value_rest))
        yield keys.float(), values_.float(), False


def reference_attend(
    cache: Packed,
    geometry: Geometry,
    query: Tensor,
    narrow: Tensor,
    rows: slice,
    length: int,
    scaling: float,
    *,
    held: int,
) -> tuple[Tensor, Tensor]:
    """Attend over equally long rows, one dequantised tile at a time, with a running softmax.

    Args:
        query: [b, H, Q, D]. narrow: its packed channels, [b, H, Q, Dk].
        held: newest tokens whose key window is not packed even if it is full.

    Returns:
        float32 [b, H, Q, D], natural log-sum-exps float32 [b, H, Q].
    """
    b, heads, queries, _ = query.shape
    kv_heads = cache.key_codes.shape[1]
    shape = (b, kv_heads, heads // kv_heads * queries, -1)
    query, narrow = query.float().reshape(shape), narrow.float().reshape(shape)
    dim = cache.value_rest.shape[-1]
    softmax = RunningSoftmax(query, dim)
    packed = geometry.key_tokens(max(length - held, 0))
    for keys, values, is_narrow in tiles(cache, geometry, rows, length, packed):
        softmax.take((narrow if is_narrow else query) @ keys.mT * scaling, values)
    return softmax.mean.view(b, heads, queries, dim), softmax.lse.view(b, heads, queries)


class RunningSoftmax:
    """Average values under the softmax of scores that come tile by tile.

    Args:
        query: [b, K, Q, D]. dim: value channels.
    """

    def __init__(self, query: Tensor, dim: int) -> None:
        self._top = query.new_full((*query.shape[:3], 1), float("-inf"))
        self._mass = torch.zeros_like(self._top)
        self._sums = query.new_zeros(*query.shape[:3], dim)

    def take(self, scores: Tensor, values: Tensor) -> None:
        """Add a tile: scores [b, K, Q, N], −∞ where unseen; values [b, K, N, Dv]."""
        higher = torch.maximum(self._top, scores.amax(-1, keepdim=True))
        weights = (scores - higher).exp()
        fade = (self._top - higher).exp()
        self._mass = self._mass * fade + weights.sum(-1, keepdim=True)
        self._sums = self._sums * fade + weights @ values
        self._top = higher

    @property
    def mean(self) -> Tensor:
        """Return the average, [b, K, Q, Dv]; 0 without tokens."""
        return self._sums / self._mass.clamp_min(torch.finfo(self._mass.dtype).tiny)

    @property
    def lse(self) -> Tensor:
        """Return the natural log-sum-exps, [b, K, Q, 1]; −∞ without tokens."""
        return self._top + self._mass.log()


def fixed_attend(
    cache: Packed,
    geometry: Geometry,
    query: Tensor,
    narrow: Tensor,
    lengths: Tensor,
    scaling: float,
) -> Tensor:
    """Attend with one query per row over rows whose lengths only the device knows.

    All tiles of the capacity are dequantised, one at a time, and what a row does not hold is
    masked. A window that the newest token completes is not packed yet.

    Args:
        query: [B, H, 1, D]. narrow: its packed channels, [B, H, 1, Dk]. lengths: int32 [B].

    Returns:
        float32 [B, H, 1, Dv].
    """
    b, heads = query.shape[:2]
    kv_heads, residual = cache.key_codes.shape[1], geometry.residual
    shape = (b, kv_heads, heads // kv_heads, -1)
    query, narrow = query.float().reshape(shape), narrow.float().reshape(shape)
    length = lengths.long()[:, None]
    keys_end = (length - 1) // residual * residual
    values_end = (length - residual).clamp_min(0)
    softmax = RunningSoftmax(query, cache.value_rest.shape[-1])

    def take(scores: Tensor, seen: Tensor, values: Tensor) -> None:
        scores = (scores * scaling).masked_fill(~seen[:, None, None, :], float("-inf"))
        softmax.take(scores, values)

    # the newest first, so that every row has seen a token when a tile of others comes
    slots = torch.arange(cache.key_rest.shape[2], device=query.device)
    newest = query @ cache.key_rest.float().mT
    take(newest, keys_end + slots < length, cache.value_rest.float())
    windows, packed = cache.key_codes.shape[2], cache.value_codes.shape[2] * geometry.block
    step = -(-TILE // residual) * residual
    everyone = slice(None)
    for begin in range(0, windows * geometry.block, step):
        end = min(begin + step, windows * geometry.block)
        tokens = torch.arange(begin, end, device=query.device)
        values = cache.value_rest[:, :, tokens % residual].float()
        stop = min(end, packed)
        if stop > begin:
            codes = packed_values(cache, geometry, everyone, begin, stop)
            gone = (tokens[: stop - begin] < values_end)[:, None, :, None]
            head = torch.where(gone, codes, values[:, :, : stop - begin])
            values = torch.cat([head, values[:, :, stop - begin :]], dim=2)
        keys = packed_keys(cache, geometry, everyone, begin, end)
        take(narrow @ keys.mT, tokens < keys_end, values)
    return softmax.mean.view(b, heads, 1, -1)


def kernel_for(query: Tensor) -> ModuleType | None:
    """Return the module of the Triton kernels if they serve these queries."""
    return kernels_for(query) if query.dtype in (torch.float16, torch.bfloat16) else None
