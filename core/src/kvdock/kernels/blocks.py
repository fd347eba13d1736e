"""Which key blocks each block of queries attends to, on the grid of absolute token positions.

Shapes: b rows, H query heads, Q queries, N keys, M block rows of queries, Nk blocks of keys, W list
width. Queries are the last Q of N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError

BLOCK = 128


@dataclass(frozen=True, slots=True)
class BlockLists:
    """List the key blocks of every block row of queries, per head.

    With ``off = N − Q``, row m belongs to absolute query block ``off // block + m``; the first may
    be entered in its middle. There are ``ceil(N / block) − off // block`` rows. Every list holds
    causal blocks only, among them block 0 and, last, the diagonal block.

    Args:
        count: int32 [b, H, M].
        index: int32 [b, H, M, W], ascending; entries past ``count`` are any valid block number.
        block: tokens per block, a power of two.
    """

    count: Tensor
    index: Tensor
    block: int = BLOCK


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Place Q queries at the end of N keys on the grid of blocks."""

    queries: int
    keys: int
    block: int = BLOCK

    @property
    def offset(self) -> int:
        """Return the absolute position of the first query."""
        return self.keys - self.queries

    @property
    def first(self) -> int:
        """Return the absolute block of the first query."""
        return self.offset // self.block

    @property
    def key_blocks(self) -> int:
        """Return the number of key blocks, Nk."""
        return -(-self.keys // self.block)

    @property
    def rows(self) -> int:
        """Return the number of block rows of queries, M."""
        return self.key_blocks - self.first

    @property
    def causal_blocks(self) -> int:
        """Return how many blocks dense causal attention visits per head."""
        return self.rows * self.first + self.rows * (self.rows + 1) // 2


def lists_from_mask(mask: Tensor, block: int = BLOCK) -> BlockLists:
    """Turn a mask, bool [b, H, M, Nk], into lists of width Nk; never waits for the device.

    Unselected blocks follow the selected ones, so every entry is a valid block number.
    """
    if mask.is_cuda and (compact := _fused()) is not None:
        return BlockLists(*compact(mask), block)
    chosen = mask.cumsum(-1, dtype=torch.int32)
    column = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    count = chosen[..., -1]
    place = torch.where(mask, chosen - 1, count[..., None] + column - chosen)
    index = torch.empty_like(chosen).scatter_(-1, place.long(), column.expand_as(chosen))
    return BlockLists(count.contiguous(), index, block)


def _fused() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    try:
        from kvdock.kernels.blocks_triton import compact
    except ImportError:  # torch without triton
        return None
    return compact


def mask_from_lists(lists: BlockLists, key_blocks: int) -> Tensor:
    """Turn lists into a mask of blocks, bool [b, H, M, key_blocks]."""
    entry = torch.arange(lists.index.shape[-1], device=lists.index.device)
    listed = entry < lists.count[..., None]
    place = torch.where(listed, lists.index.long(), key_blocks)
    mask = torch.zeros(
        *lists.count.shape, key_blocks + 1, dtype=torch.bool, device=lists.count.device
    )
    return mask.scatter_(-1, place, True)[..., :key_blocks]


def all_blocks(grid: BlockGrid, rows: int, heads: int, device: torch.device | str) -> BlockLists:
    """Return the lists of dense causal attention."""
    column = torch.arange(grid.key_blocks, dtype=torch.int32, device=device)
    count = column[grid.first :] + 1
    shape = (rows, heads, grid.rows)
    return BlockLists(
        count.expand(shape).contiguous(), column.expand(*shape, -1).contiguous(), grid.block
    )


def density(lists: BlockLists, queries: int, keys: int) -> Tensor:
    """Return selected over all causal blocks, float32 [b, H], on the device."""
    grid = BlockGrid(queries, keys, lists.block)
    return lists.count.sum(-1, dtype=torch.int64).float() / grid.causal_blocks


def check_lists(lists: BlockLists, query: Tensor, key: Tensor) -> BlockGrid:
    """Check shapes and types of lists against [b, H, Q, D] and [b, K, N, D]; return their grid."""
    grid = BlockGrid(query.shape[2], key.shape[2], lists.block)
    expected = (query.shape[0], query.shape[1], grid.rows)
    if lists.block & (lists.block - 1) or lists.block < 1:
        raise UnsupportedError(f"block is {lists.block}; expected a power of two.")
    if lists.count.shape != expected or lists.index.shape[:-1] != expected:
        raise UnsupportedError(
            f"block lists of shape {tuple(lists.count.shape)} and {tuple(lists.index.shape)} do not"
            f" fit {grid.queries} queries at the end of {grid.keys} keys; expected {expected} and"
            f" {(*expected, 'W')} for blocks of {lists.block}."
        )
    if lists.count.dtype != torch.int32 or lists.index.dtype != torch.int32:
        raise UnsupportedError(
            f"block lists are {lists.count.dtype} and {lists.index.dtype}; expected torch.int32."
        )
    return grid
