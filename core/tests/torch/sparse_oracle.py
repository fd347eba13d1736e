"""Random block lists, and block-sparse attention in float64."""

import torch

from kvdock.kernels.blocks import lists_from_mask


def states(grid, dim, *, rows=2, heads=4, kv_heads=2, dtype=torch.float32, seed=0):
    """Return random states as a model leaves them: views of [b, T, heads, D]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, length):
        drawn = torch.randn(rows, length, count, dim, generator=generator)
        return drawn.to(dtype).transpose(1, 2)

    return draw(heads, grid.queries), draw(kv_heads, grid.keys), draw(kv_heads, grid.keys)


def block_mask(grid, *, rows=2, heads=4, share=0.4, seed=0):
    """Return a mask of causal blocks with block 0 and the diagonal, bool [b, H, M, Nk]."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(grid.rows)[:, None] + grid.first
    column = torch.arange(grid.key_blocks)
    drawn = torch.rand(rows, heads, grid.rows, grid.key_blocks, generator=generator) < share
    return (drawn | (column == 0) | (column == row)) & (column <= row)


def random_lists(grid, **kwargs):
    return lists_from_mask(block_mask(grid, **kwargs), grid.block)


def _logits(query, key, mask, grid, scaling):
    group = query.shape[1] // key.shape[1]
    key = key.double().repeat_interleave(group, 1)
    position = torch.arange(grid.keys)
    query_at = position[grid.offset :]
    visible = mask[:, :, query_at // grid.block - grid.first][..., position // grid.block]
    visible &= position <= query_at[:, None]
    return (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)


def oracle(query, key, value, mask, grid, scaling):
    """Return [b, Q, H, D] in float64, from token positions only."""
    weights = _logits(query, key, mask, grid, scaling).softmax(-1).nan_to_num(0.0)
    group = query.shape[1] // key.shape[1]
    return (weights @ value.double().repeat_interleave(group, 1)).transpose(1, 2)


def log_sums(query, key, mask, grid, scaling):
    """Return the log-sum-exps, float64 [b, H, Q]."""
    return _logits(query, key, mask, grid, scaling).logsumexp(-1)
