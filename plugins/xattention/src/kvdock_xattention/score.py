"""Launch the score kernels: one part of the work, cut as a shape says.

Shapes: b rows, H query heads, K key/value heads, G = H/K, Q queries, N keys, D head_dim, S stride,
Nk key blocks. A pair is a row of the batch and one of its key/value heads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvdock_xattention.grid import TileGrid
from kvdock_xattention.score_kernels import score_items, score_walking


@dataclass(frozen=True, slots=True)
class Shape:
    """Say how one program is cut and how programs follow each other.

    Args:
        queries, keys: tiles per program; keys is a multiple of the tiles of a block.
        inner: channels per step.
        band: query groups whose programs run side by side, so that they share keys in the cache.
        descriptors: load by tensor descriptors where every row of a tile exists.
        programs: per multiprocessor, each walking over many items; None gives every item its own.
    """

    queries: int = 128
    keys: int = 256
    inner: int = 64
    warps: int = 8
    stages: int = 3
    band: int = 2
    descriptors: bool = False
    programs: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Name a part of the work: pairs ``pair …`` and query groups ``low … high``."""

    pair: int
    pairs: int
    low: int
    high: int


def score(
    query: Tensor,
    key: Tensor,
    level: Tensor,
    scale: float,
    grid: TileGrid,
    part: Part,
    shape: Shape,
) -> None:
    """Write the levels of one part of the work.

    Args:
        query: [b, H, Q, D]. key: [b, K, N, D]. Their last dimension is contiguous.
        level: float32 [pairs · G, tiles of the part, Nk]; only causal blocks are written.
        scale: factor of A in the exponent to base 2.
    """
    if not shape.descriptors:
        _launch(query, key, level, scale, grid, part, part.low, part.high, shape)
        return
    # a tile with missing rows needs them as zeros, which a descriptor of whole tiles cannot give
    plain = replace(shape, descriptors=False, stages=min(shape.stages, 3))
    groups = -(-grid.query_tiles // shape.queries)
    low = max(part.low, 1) if grid.lead % grid.stride else part.low
    high = min(part.high, groups - 1) if grid.keys % grid.stride else part.high
    if low >= high:
        _launch(query, key, level, scale, grid, part, part.low, part.high, plain)
        return
    _launch(query, key, level, scale, grid, part, low, high, shape)
    _launch(query, key, level, scale, grid, part, part.low, low, plain)
    _launch(query, key, level, scale, grid, part, high, part.high, plain)


def _launch(
    query: Tensor, key: Tensor, level: Tensor, scale: float, grid: TileGrid, part: Part,
    low: int, high: int, shape: Shape,
) -> None:  # fmt: skip
    if low >= high:
        return
    kv_heads, d = key.shape[1], key.shape[3]
    group = query.shape[1] // kv_heads
    width = _width(grid, low, high, shape)
    bands = -(-(high - low) // shape.band)
    items = -(-bands // 2) * width * shape.band * group
    inner = min(shape.inner, d & -d)
    q, k = query, key
    if shape.descriptors:
        q = _descriptor(query, -grid.lead % grid.stride, grid.stride, shape.queries, inner)
        k = _descriptor(key, 0, grid.stride, shape.keys, inner)
    arguments = (
        q, k, level, level.stride(1), *query.stride()[:3], *key.stride()[:3],
        kv_heads, part.pair, part.low, low, high, grid.first, grid.lead, query.shape[2],
        key.shape[2], grid.query_tiles, grid.key_tiles, grid.blocks.key_blocks,
        level.shape[1], width, items,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "GROUP": group, "BAND": shape.band, "S": grid.stride, "HEAD_DIM": d,
        "QUERIES": shape.queries, "KEYS": shape.keys, "INNER": inner,
        "PER_BLOCK": grid.per_block, "DESCRIPTORS": shape.descriptors, "UPCAST": _upcast(query),
        "num_warps": shape.warps, "num_stages": shape.stages,
    }  # fmt: skip
    every = items * part.pairs
    if shape.programs is None:
        score_items[(every,)](*arguments, scale, **settings)
        return
    units = torch.cuda.get_device_properties(query.device).multi_processor_count
    score_walking[(min(every, shape.programs * units),)](*arguments, every, scale, **settings)


def _width(grid: TileGrid, low: int, high: int, shape: Shape) -> int:
    """Return the most key groups that a long and a short band reach together; see `_locate`."""

    def reach(band: int) -> int:
        group = min(low + (band + 1) * shape.band, high)
        return -(-min(grid.first + group * shape.queries, grid.key_tiles) // shape.keys)

    bands = -(-(high - low) // shape.band)
    pairs = ((band, bands - 1 - band) for band in range((bands + 1) // 2))
    return max(reach(far) + (reach(near) if near < far else 0) for near, far in pairs)


def _descriptor(states: Tensor, start: int, stride: int, tiles: int, inner: int) -> Any:
    """Describe the whole tiles of [b, H, T, D] from token ``start`` on as [b, H, S, tiles, D]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    b, h, t, d = states.shape
    batch, head, row, _ = states.stride()
    return TensorDescriptor(
        states[:, :, start:],
        [b, h, stride, (t - start) // stride, d],
        [batch, head, row, stride * row, 1],
        [1, 1, 1, tiles, inner],
    )


def _upcast(states: Tensor) -> bool:
    """Say whether to multiply in float32: the interpreter's NumPy knows no bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1" and states.dtype == torch.bfloat16
