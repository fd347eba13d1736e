"""Block-sparse attention in plain torch on any device; the yardstick of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.kernels.blocks import BlockLists, mask_from_lists
from kvdock.kernels.sparse import check_call
from kvdock.policy import AttentionParams

ROWS = 8
"""Block rows per step: scores are [b, H, 8 · block, N] at most, never T×T for long prompts."""


class ReferenceSparse:
    """Attend with explicit scores under the blocks' mask, some block rows at a time."""

    name = "reference"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lists: BlockLists,
        params: AttentionParams,
    ) -> Tensor:
        """Attend over the listed blocks; see `SparseBackend.attend`."""
        grid = check_call(query, key, value, lists, params)
        mask = mask_from_lists(lists, grid.key_blocks)
        output = query.new_empty(query.shape[0], grid.queries, query.shape[1], value.shape[-1])
        for row in range(0, grid.rows, ROWS):
            low = max((grid.first + row) * grid.block, grid.offset)
            high = min((grid.first + row + ROWS) * grid.block, grid.keys)
            visible = _visible(mask[:, :, row : row + ROWS], low, high, grid.block)
            span = slice(low - grid.offset, high - grid.offset)
            states = _attend(
                query[:, :, span], key[:, :, :high], value[:, :, :high], visible, params.scaling
            )
            output[:, span] = states.transpose(1, 2)
        return output


def _visible(mask: Tensor, low: int, high: int, block: int) -> Tensor:
    """Spread block rows over the tokens: bool [b, H, high − low, high], causal."""
    position = torch.arange(high, device=mask.device)
    rows, columns = position[low:], position
    spread = mask[:, :, rows // block - low // block][..., columns // block]
    return spread & (columns <= rows[:, None])


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
    scores = (scores * scaling).masked_fill_(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill_(empty, 0.0)
    return weights.to(value.dtype) @ value
