"""Antidiagonal block masses and the threshold rules in plain torch, on any device.

Shapes: b rows, H query heads, K key/value heads, G = H/K, Q queries, N keys, D head_dim, S stride,
M block rows of queries, Nk key blocks, t query tiles, u key tiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.kernels.blocks import BlockLists, lists_from_mask
from kvdock_xattention.grid import TileGrid

SCORE_BYTES = 64 * 2**20
"""Largest block of scores, or that of one block row where this is larger."""


def block_mass(query: Tensor, key: Tensor, scaling: float, grid: TileGrid) -> Tensor:
    """Return W[b, H, M, Nk]: the estimated attention of each block row to each key block.

    A row of W sums to its number of tiles. Scores are float32, or float64 for such inputs.

    Args:
        query: [b, H, Q, D]. key: [b, K, N, D].
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    tail = -grid.keys % grid.stride
    left = F.pad(query.to(kind), (0, 0, grid.lead, tail)).unflatten(2, (-1, grid.stride))
    right = F.pad(key.to(kind), (0, 0, 0, tail)).unflatten(2, (-1, grid.stride))
    left = left.flip(3).flatten(3).unflatten(1, (key.shape[1], -1))  # [b, K, G, t, S·D]
    right = right.flatten(3)[:, :, None]  # [b, K, 1, u, S·D]
    blocks, per_block = grid.blocks, grid.per_block
    mass = left.new_zeros(*left.shape[:3], blocks.rows, blocks.key_blocks)
    line = left.shape[:3].numel() * per_block * grid.key_tiles * left.element_size()
    step = max(1, SCORE_BYTES // line)
    for row in range(0, blocks.rows, step):
        low, high = row * per_block, min((row + step) * per_block, grid.query_tiles)
        seen = grid.first + high
        scores = left[..., low:high, :] @ right[..., :seen, :].transpose(-1, -2)
        tile = torch.arange(seen, device=scores.device)
        scores.mul_(scaling / grid.stride)
        scores.masked_fill_(tile > tile[grid.first + low :, None], float("-inf"))
        share = scores.softmax(-1)
        share[..., : max(0, grid.empty - low), :] = 0.0
        share = F.pad(share, (0, -seen % per_block, 0, -(high - low) % per_block))
        share = share.unflatten(-1, (-1, per_block)).sum(-1)
        share = share.unflatten(-2, (-1, per_block)).sum(-2)
        mass[..., row : row + step, : share.shape[-1]] = share
    return mass.flatten(1, 2)


def chosen_blocks(mass: Tensor, first: int, thresholds: Tensor, loose: int = 0) -> Tensor:
    """Apply the threshold rule to W [b, H, M, Nk]; return a mask of blocks, bool.

    Block 0 and the diagonal block stay; of the others, the largest first and the lower of equal
    ones, each stays while what precedes it is below the threshold's share of the row.

    Args:
        first: absolute block of row 0.
        thresholds: [1] or [H].
        loose: absolute blocks below this follow the rule of the public code's first score chunk:
            block 0 competes like the others, and one block more stays than the share needs.
    """
    rows, columns = mass.shape[-2:]
    block = torch.arange(columns, device=mass.device)
    own = block[first : first + rows, None]
    causal, diagonal, sink = block <= own, block == own, (block == 0).expand(rows, columns)
    is_loose = own < loose
    counted = torch.where(is_loose, diagonal, diagonal | sink)
    candidate = causal & ~counted
    mass = mass.masked_fill(~causal, 0.0)
    need = thresholds.to(mass)[:, None, None] * mass.sum(-1, keepdim=True)
    ranked, order = mass.masked_fill(~candidate, -1.0).sort(dim=-1, descending=True, stable=True)
    ranked = ranked.clamp(min=0.0)
    before = (mass * counted).sum(-1, keepdim=True) + ranked.cumsum(-1) - ranked
    keep = before < need
    shifted = F.pad(keep[..., :-1], (1, 0), value=True) & (need > 0)
    keep = torch.where(is_loose, shifted, keep)
    kept = torch.zeros_like(keep).scatter_(-1, order, keep)
    everything = thresholds.to(mass)[:, None, None] >= 1
    return ((kept | everything) & causal) | diagonal | sink


def select_reference_lists(
    query: Tensor,
    key: Tensor,
    scaling: float,
    grid: TileGrid,
    thresholds: Tensor,
    *,
    loose: int = 0,
    share: bool = False,
) -> BlockLists:
    """Return what `pipeline.select_by_kernels` returns, in plain torch."""
    mass = block_mass(query, key, scaling, grid)
    if share:
        grouped = mass.unflatten(1, (key.shape[1], -1))
        mass = grouped.sum(2, keepdim=True).expand_as(grouped).flatten(1, 2)
    mask = chosen_blocks(mass, grid.blocks.first, thresholds, loose)
    return lists_from_mask(mask, grid.block)
