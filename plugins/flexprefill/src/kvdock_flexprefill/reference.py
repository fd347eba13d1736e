"""FlexPrefill's selection in plain torch, float64 for float64 states and float32 otherwise.

Shapes: b rows, H query heads, K key/value heads, Q queries, N keys, R representative queries, D
head_dim, M block rows of queries, Nk key blocks, B tokens per block; i, j, l number absolute query
blocks, key blocks and block diagonals (l = i − j).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, BlockLists, all_blocks, lists_from_mask
from kvdock.policy import AttentionParams
from kvdock_flexprefill.options import FlexPrefillOptions

PUBLISHED_BLOCK = 128
"""By which the published code turns counted tokens into blocks, whatever the block is."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Say what was decided per head, before the rows of query-aware heads are looked at.

    Args:
        vertical: bool [b, H, Nk], key blocks that every row attends to.
        slash: bool [b, H, Nk], block diagonals that every row attends to.
        aware: bool [b, H], heads whose pooled scores can be trusted.
    """

    vertical: Tensor
    slash: Tensor
    aware: Tensor


def select_reference(
    query: Tensor, key: Tensor, params: AttentionParams, options: FlexPrefillOptions
) -> BlockLists:
    """Compute `select` in plain torch on any device."""
    grid = BlockGrid(query.shape[2], key.shape[2], options.block)
    if options.gamma >= 1:
        return all_blocks(grid, query.shape[0], query.shape[1], query.device)
    query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key))
    pattern = find_pattern(query, key, params.scaling, options)
    mask = _spread(pattern, grid)
    if options.tau > 0:
        shares = _pooled_attention(query, key, params.scaling, grid)
        pick = _cover_rows if options.mode == "exact" else _cover_all
        mask |= pick(shares, options.gamma) & pattern.aware[..., None, None]
    return lists_from_mask(mask, options.block)


def find_pattern(
    query: Tensor, key: Tensor, scaling: float, options: FlexPrefillOptions
) -> Pattern:
    """Decide verticals, slashes and the kind of every head from the last queries."""
    block = options.block
    grid = BlockGrid(query.shape[2], key.shape[2], block)
    rows = query[:, :, -min(block, grid.queries) :]
    attention = _attention(rows, key, scaling)
    vertical = _block_sums(attention.mean(2), block)
    pooled = _pooled_logits(rows.mean(2, keepdim=True), key, scaling, block)
    divergence = jensen_shannon(pooled[:, :, 0].softmax(-1), vertical)
    low, high = options.bounds(grid.key_blocks)
    if options.mode == "exact":
        aware = divergence < options.tau
        slash = _diagonal_sums(attention, grid)
        counts = [covering_count(mass, options.gamma) for mass in (vertical, slash)]
    else:
        # the published divergence is NaN, and no head query-aware, where a share is zero
        zero = (vertical == 0).any(-1) | (pooled[:, :, 0].softmax(-1) == 0).any(-1)
        aware = (divergence < options.tau) & ~zero
        offsets = _offset_sums(attention)
        counts = [
            published_count(mass, options.gamma) // PUBLISHED_BLOCK + 1
            for mass in (attention.mean(2), offsets)
        ]
        # chunks of offsets are cut from the far end
        slash = _block_sums(F.pad(offsets, (grid.key_blocks * block - grid.keys, 0)), block)
    counts = [count.clamp(low, high).masked_fill(aware, low) for count in counts]
    return Pattern(_largest(vertical, counts[0]), _largest(slash, counts[1]), aware)


def last_block_shares(query: Tensor, key: Tensor, scaling: float, block: int) -> Tensor:
    """Return how the last queries' attention is shared by the key blocks, [b, H, Nk]."""
    rows = query[:, :, -min(block, query.shape[2]) :]
    return _block_sums(_attention(rows, key, scaling).mean(2), block)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the square root of the Jensen–Shannon divergence of [..., n], natural logarithm."""
    middle = (p + q) / 2
    apart = torch.xlogy(p, p) + torch.xlogy(q, q) - torch.xlogy(p + q, middle)
    return (apart.sum(-1) / 2).clamp_min(0).sqrt()


def covering_count(mass: Tensor, gamma: float) -> Tensor:
    """Return how few entries of [..., n], the first one among them, hold a share gamma."""
    mass = mass.gather(-1, _first_then_largest(mass))
    return (mass.cumsum(-1) < gamma * mass.sum(-1, keepdim=True)).sum(-1) + 1


def published_count(mass: Tensor, gamma: float) -> Tensor:
    """Return 1 and how many of the largest entries of [..., n] have an inclusive sum ≤ gamma."""
    return (mass.sort(dim=-1, descending=True).values.cumsum(-1) <= gamma).sum(-1) + 1


def _first_then_largest(mass: Tensor) -> Tensor:
    """Return the order of [..., n]: the first entry, then by size, equal ones by place."""
    first = torch.arange(mass.shape[-1], device=mass.device) == 0
    return mass.masked_fill(first, float("inf")).sort(dim=-1, descending=True, stable=True).indices


def _largest(mass: Tensor, count: Tensor) -> Tensor:
    """Mark the first and the largest entries of [..., n], ``count`` [...] in all."""
    rank = torch.arange(mass.shape[-1], device=mass.device)
    chosen = rank < count[..., None]
    return torch.zeros_like(chosen).scatter(-1, _first_then_largest(mass), chosen)


def _attention(rows: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return the probabilities of the last queries, [b, H, R, N]."""
    scores = _grouped_product(rows, key) * scaling
    r = rows.shape[2]
    future = torch.ones(r, r, dtype=torch.bool, device=key.device).triu(1)
    scores[..., key.shape[2] - r :].masked_fill_(future, float("-inf"))
    return scores.softmax(-1)


def _grouped_product(rows: Tensor, key: Tensor) -> Tensor:
    """Multiply [b, H, R, D] by [b, K, N, D]ᵀ, keys shared by the heads of a group."""
    grouped = rows.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return (grouped @ key.transpose(2, 3)).unflatten(2, (-1, rows.shape[2])).flatten(1, 2)


def _block_sums(mass: Tensor, block: int) -> Tensor:
    """Sum [..., N] over blocks of the last dimension."""
    return F.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def _diagonal_sums(attention: Tensor, grid: BlockGrid) -> Tensor:
    """Sum the probabilities [b, H, R, N] on each block diagonal of the absolute grid, [b, H, Nk].

    The last R ≤ B queries lie in the last block and, maybe, in the one before.
    """
    r = attention.shape[2]
    last = min(r, grid.keys - (grid.key_blocks - 1) * grid.block)
    blocks = _block_sums(attention, grid.block).flip(-1)
    newer, older = blocks[:, :, r - last :].sum(2), blocks[:, :, : r - last].sum(2)
    return (newer + F.pad(older[..., 1:], (0, 1))) / r


def _offset_sums(attention: Tensor) -> Tensor:
    """Average the probabilities [b, H, R, N] over queries at each offset q − k, [b, H, N]."""
    r, n = attention.shape[2:]
    # flipped, row r is R − 1 − r places late: cut the padded rows one element shorter each
    flat = F.pad(attention.flip(-1), (0, r)).flatten(2)
    width = n + r - 1
    return flat[..., r - 1 :][..., : r * width].unflatten(-1, (r, width))[..., :n].mean(2)


def _pooled_logits(means: Tensor, key: Tensor, scaling: float, block: int) -> Tensor:
    """Score means of queries [b, H, M, D] against the means of key blocks, [b, H, M, Nk]."""
    return _grouped_product(means, _block_means(key, 0, block)) * scaling


def _block_means(states: Tensor, start: int, block: int) -> Tensor:
    """Average [b, h, n, D], whose first row stands at ``start``, over blocks of the grid."""
    n = states.shape[2]
    left, right = start % block, -(start + n) % block
    sums = F.pad(states, (0, 0, left, right)).unflatten(2, (-1, block)).sum(3)
    real = F.pad(torch.ones(n, device=states.device, dtype=states.dtype), (left, right))
    return sums / real.view(-1, block).sum(-1)[:, None]


def _pooled_attention(query: Tensor, key: Tensor, scaling: float, grid: BlockGrid) -> Tensor:
    """Return the causal attention of pooled queries to pooled keys, [b, H, M, Nk]."""
    means = _block_means(query, grid.offset, grid.block)
    logits = _pooled_logits(means, key, scaling, grid.block)
    return logits.masked_fill(_distance(grid, key.device) < 0, float("-inf")).softmax(-1)


def _distance(grid: BlockGrid, device: torch.device) -> Tensor:
    """Return i − j, int64 [M, Nk]."""
    column = torch.arange(grid.key_blocks, device=device)
    return column[grid.first :, None] - column


def _spread(pattern: Pattern, grid: BlockGrid) -> Tensor:
    """Turn verticals and slashes into a mask of blocks, bool [b, H, M, Nk]."""
    distance = _distance(grid, pattern.slash.device)
    slash = pattern.slash[..., distance.clamp_min(0)]
    return (pattern.vertical[..., None, :] | slash) & (distance >= 0)


def _cover_rows(shares: Tensor, gamma: float) -> Tensor:
    """Mark the fewest blocks of every row [..., M, Nk] that hold a share gamma of it."""
    shares, order = shares.sort(dim=-1, descending=True, stable=True)
    total = shares.cumsum(-1)
    needed = total - shares < gamma * total[..., -1:]
    return torch.zeros_like(needed).scatter(-1, order, needed)


def _cover_all(shares: Tensor, gamma: float) -> Tensor:
    """Mark the largest blocks of all rows together whose inclusive sum is within gamma · M."""
    flat, order = shares.flatten(-2).sort(dim=-1, descending=True, stable=True)
    within = flat.double().cumsum(-1) <= gamma * shares.shape[-2]
    marked = torch.zeros_like(within).scatter(-1, order, within)
    return marked.view(shares.shape) & (shares > 0)
