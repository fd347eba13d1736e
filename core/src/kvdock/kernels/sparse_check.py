"""Try a block-sparse backend on a small case before it is trusted with a model."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockGrid, lists_from_mask
from kvdock.kernels.sparse import SparseBackend
from kvdock.kernels.sparse_reference import ReferenceSparse
from kvdock.policy import AttentionParams

TOLERANCE = 2e-2
QUERIES_BLOCKS, KEYS_BLOCKS = 4.5, 6.25


def trust(backend: SparseBackend, device: torch.device, head_dim: int, block: int) -> None:
    """Raise unless the backend heeds the lists: first and diagonal block only, Q shorter than N.

    A library that ignores the lists (on a chip it does not serve, or uncompiled) gives dense
    attention, which is far from what the reference computes here.
    """
    hashable: Any = backend
    error = _error(hashable, device, head_dim, block)
    if not error < TOLERANCE:
        raise UnsupportedError(
            f"it does not attend to the listed blocks only: a small case differs from the reference"
            f" by {error:.1%}, expected below {TOLERANCE:.0%}"
        )


@cache
def _error(backend: Any, device: torch.device, head_dim: int, block: int) -> float:
    grid = BlockGrid(int(QUERIES_BLOCKS * block), int(KEYS_BLOCKS * block), block)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, head_dim, generator=generator).to(device, torch.bfloat16)
        for heads, length in ((2, grid.queries), (1, grid.keys), (1, grid.keys))
    )
    row = torch.arange(grid.rows, device=device)[:, None] + grid.first
    column = torch.arange(grid.key_blocks, device=device)
    mask = ((column == 0) | (column == row)).expand(1, 2, -1, -1)
    lists, params = lists_from_mask(mask, block), AttentionParams(head_dim**-0.5)
    found = backend.attend(query, key, value, lists, params).float()
    expected = ReferenceSparse().attend(query.float(), key.float(), value.float(), lists, params)
    return float((found - expected).norm() / expected.norm())
