"""Which key blocks every head attends to: the public entry, choosing kernels or plain torch."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockGrid, BlockLists, all_blocks
from kvdock.policy import AttentionParams
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import select_reference

__all__ = ["select", "select_reference"]


def select(
    query: Tensor, key: Tensor, params: AttentionParams, options: FlexPrefillOptions
) -> BlockLists:
    """Select key blocks for every block of queries and every head, without waiting for the device.

    Args:
        query: [b, H, Q, D], the last Q of N tokens. key: [b, K, N, D]. Any strides.

    Returns:
        Lists on the absolute grid of ``options.block`` tokens; all causal blocks for gamma ≥ 1.
    """
    if not params.plain:
        raise UnsupportedError(
            "FlexPrefill selects by softmax(q·k·scaling); this model caps its scores or has learned"
            " sinks. Attend densely."
        )
    if options.gamma >= 1:
        grid = BlockGrid(query.shape[2], key.shape[2], options.block)
        return all_blocks(grid, query.shape[0], query.shape[1], query.device)
    kernels = _kernels() if query.is_cuda else None
    if kernels is not None and params.scaling > 0 and kernels.serves(query, key, options):
        lists: BlockLists = kernels.select(query, key, params.scaling, options)
        return lists
    return select_reference(query, key, params, options)


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton kernels, or None where Triton cannot be imported."""
    try:
        from kvdock_flexprefill import launch
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return launch
