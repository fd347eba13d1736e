"""Selection on a GPU: scores and choice, part by part, so that the levels stay small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvdock.kernels.blocks import BlockLists
from kvdock_xattention.choice_kernels import choose
from kvdock_xattention.grid import TileGrid
from kvdock_xattention.score import Part, Shape, score

LEVEL_BYTES = 512 * 2**20
"""Largest tensor of levels; a part is one pair and one band of query groups at least."""
LOG2E = math.log2(math.e)


def serves(query: Tensor) -> bool:
    """Say whether the kernels take this data type and head_dim."""
    d = query.shape[-1]
    return query.dtype in (torch.float16, torch.bfloat16, torch.float32) and not d % 16


def select_by_kernels(
    query: Tensor,
    key: Tensor,
    scaling: float,
    grid: TileGrid,
    thresholds: Tensor,
    *,
    loose: int = 0,
    share: bool = False,
    shape: Shape | None = None,
    mass: Tensor | None = None,
    level_bytes: int = LEVEL_BYTES,
) -> BlockLists:
    """Return the lists of [b, H, Q, D] queries against [b, K, N, D] keys.

    Args:
        thresholds: float32 [1] or [H], on the device.
        loose: absolute blocks below this follow the compat rule.
        share: add the masses of a key/value head's group and give it one list.
        mass: float32 [b, H, M, Nk], filled with the masses of the blocks where given.
    """
    query, key = _rows_contiguous(query), _rows_contiguous(key)
    b, heads = query.shape[:2]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    shape = shape or default_shape(query, key, grid)
    blocks = grid.blocks
    size = (b, heads, blocks.rows)
    lists = BlockLists(
        torch.empty(size, dtype=torch.int32, device=query.device),
        torch.empty(*size, blocks.key_blocks, dtype=torch.int32, device=query.device),
        grid.block,
    )
    level: Tensor | None = None
    row = level_row(grid)
    for part in parts(b * kv_heads, group, grid, shape, level_bytes):
        tiles = (part.high - part.low) * shape.queries
        wanted = (part.pairs * group, tiles, row)
        if level is None:
            level = torch.empty(math.prod(wanted), dtype=torch.float32, device=query.device)
        here = level[: math.prod(wanted)].view(wanted)
        score(query, key, here, scaling / grid.stride * LOG2E, grid, part, shape)
        choose(
            here, thresholds, lists, grid, part, shape.queries,
            loose=loose, share=group if share else 1, mass=mass,
        )  # fmt: skip
    return lists


def parts(pairs: int, group: int, grid: TileGrid, shape: Shape, level_bytes: int) -> Iterator[Part]:
    """Cut the work so that the levels of a part fit ``level_bytes``; the largest part first."""
    groups = -(-grid.query_tiles // shape.queries)
    row = 4 * group * shape.queries * level_row(grid)
    if groups * row <= level_bytes:
        step = min(pairs, level_bytes // (groups * row))
        for pair in range(0, pairs, step):
            yield Part(pair, min(step, pairs - pair), 0, groups)
        return
    step = max(1, level_bytes // (row * shape.band)) * shape.band
    for pair in range(pairs):
        for low in range(0, groups, step):
            yield Part(pair, 1, low, min(low + step, groups))


def level_row(grid: TileGrid) -> int:
    """Return the numbers per row of levels, rounded up so that rows load in whole vectors."""
    return -(-grid.blocks.key_blocks // 16) * 16


def default_shape(query: Tensor, key: Tensor, grid: TileGrid) -> Shape:
    """Return the shape that was fastest where it was measured, one that fits elsewhere."""
    group = query.shape[1] // key.shape[1]
    band = max(1, 8 // group)
    if query.dtype == torch.float32:
        return Shape(queries=64, keys=64, inner=32, warps=4, stages=2, band=band)
    device = torch.cuda.get_device_properties(query.device)
    if device.major not in (9, 10):  # less shared memory, and no descriptors
        return Shape(queries=128, keys=128, inner=32, warps=8, stages=3, band=band)
    described = _aligned(query) and _aligned(key)
    shape = Shape(queries=128, keys=256, warps=8, stages=3, band=band, descriptors=described)
    groups, columns = -(-grid.query_tiles // 128), -(-grid.key_tiles // 256)
    items = query.shape[0] * query.shape[1] * groups * columns // 2
    if items < 8 * device.multi_processor_count:
        return replace(shape, keys=128, warps=4)
    if described and items >= 64 * device.multi_processor_count:
        return replace(shape, stages=4, programs=1)
    return shape


def _aligned(states: Tensor) -> bool:
    """Say whether a descriptor takes these addresses."""
    size = states.element_size()
    return states.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in states.stride()[:3])


def _rows_contiguous(states: Tensor) -> Tensor:
    """Return states whose last dimension is contiguous, as the kernels' addresses assume."""
    return states if states.stride(-1) == 1 else states.contiguous()
