"""Which blocks every block row attends to: XAttention's selection on any device.

Shapes: b rows, H query heads, K key/value heads, Q queries at the end of N keys, D head_dim.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kvdock.errors import OptionError
from kvdock.kernels.blocks import BlockLists, all_blocks
from kvdock.policy import AttentionParams
from kvdock_xattention.grid import TileGrid
from kvdock_xattention.options import XAttentionOptions
from kvdock_xattention.reference import select_reference_lists


def select(
    query: Tensor, key: Tensor, params: AttentionParams, options: XAttentionOptions
) -> BlockLists:
    """Return the lists of [b, H, Q, D] queries against [b, K, N, D] keys, of any strides."""
    kernels = _kernels() if query.is_cuda and params.scaling > 0 else None
    if kernels is None or not kernels.serves(query):
        return select_reference(query, key, params, options)
    grid, thresholds = _task(query, key, options)
    if options.dense:
        return all_blocks(grid.blocks, query.shape[0], query.shape[1], query.device)
    with torch.cuda.device(query.device):
        lists: BlockLists = kernels.select_by_kernels(
            query, key, params.scaling, grid, thresholds,
            loose=_loose(grid, options), share=options.share_group,
        )  # fmt: skip
    return lists


def select_reference(
    query: Tensor, key: Tensor, params: AttentionParams, options: XAttentionOptions
) -> BlockLists:
    """Compute `select` in plain torch, in float32 or the inputs' float64."""
    grid, thresholds = _task(query, key, options)
    if options.dense:
        return all_blocks(grid.blocks, query.shape[0], query.shape[1], query.device)
    return select_reference_lists(
        query, key, params.scaling, grid, thresholds,
        loose=_loose(grid, options), share=options.share_group,
    )  # fmt: skip


def score_chunk(keys: int) -> int:
    """Return the tokens of a score chunk in the authors' code: all up to 16K, 2K from 128K on."""
    power = max(2048, 1 << (keys - 1).bit_length())
    return max(2048, min(power, 131072 * 2048 // power))


def _loose(grid: TileGrid, options: XAttentionOptions) -> int:
    """Return the absolute blocks that follow the rule of the first score chunk."""
    return score_chunk(grid.keys) // grid.block if options.mode == "compat" else 0


def _task(query: Tensor, key: Tensor, options: XAttentionOptions) -> tuple[TileGrid, Tensor]:
    heads = query.shape[1]
    if len(options.thresholds) not in (1, heads):
        raise OptionError(
            f"xattention: threshold has {len(options.thresholds)} values, but the model has {heads}"
            f" query heads; expected one, or {heads}."
        )
    grid = TileGrid(query.shape[2], key.shape[2], options.stride, options.block)
    if len(options.thresholds) == 1:  # filled on the device: nothing is copied, nothing waits
        return grid, torch.full((1,), options.thresholds[0], device=query.device)
    table = torch.tensor(options.thresholds)
    return grid, table.pin_memory().to(query.device, non_blocking=True) if query.is_cuda else table


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton pipeline, or None where Triton cannot be imported."""
    try:
        from kvdock_xattention import pipeline
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return pipeline
