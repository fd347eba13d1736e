"""States with known structure and short calls of the selectors."""

import torch

from kvdock.kernels.blocks import BlockGrid, mask_from_lists
from kvdock.policy import AttentionParams
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.selection import select


def states(seed, *, rows=1, heads=4, kv_heads=2, queries=None, keys=384, head_dim=16):
    """Return float64 q, k: sharper head by head, with a sink and heavy keys; the first are flat."""
    generator = torch.Generator().manual_seed(seed)
    queries = keys if queries is None else queries

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    common = noise(1, kv_heads, 1, head_dim)
    key = noise(rows, kv_heads, keys, head_dim)
    key[:, :, :: max(2, keys // 7)] += 1.5 * common
    key[:, :, :1] += 2 * common
    sharp = torch.linspace(0.02, 1.6, heads, dtype=torch.float64)[:, None, None]
    query = noise(rows, heads, queries, head_dim)
    query = sharp * (query + common.repeat_interleave(heads // kv_heads, 1))
    return query, key


def options(**changes):
    return FlexPrefillOptions(**{"min_budget": 128, "dense_below": 0, **changes})


def mask_of(query, key, chosen, scaling=None, run=select):
    """Return the selected blocks, bool [b, H, M, Nk]."""
    lists = run(query, key, AttentionParams(scaling or query.shape[-1] ** -0.5), chosen)
    grid = BlockGrid(query.shape[2], key.shape[2], chosen.block)
    return mask_from_lists(lists, grid.key_blocks)


def planted(rho=None, verticals=(), *, keys=2048, head_dim=64, block=128, strength=12.0):
    """Return float64 q, k [1, 1, N, D] whose attention is a slash of ``2 blocks + rho`` or
    verticals: query t meets key t − offset alone, or all of the given keys alike."""
    generator = torch.Generator().manual_seed(keys)
    code = torch.randn(keys, head_dim, generator=generator, dtype=torch.float64)
    code = code / code.norm(dim=-1, keepdim=True)
    query, key = torch.zeros_like(code), code.clone()
    if rho is not None:
        offset = 2 * block + rho
        query[offset:] = code[: keys - offset]
    if verticals:
        mark = torch.zeros(head_dim, dtype=torch.float64)
        mark[0] = 1.0
        key[list(verticals)] = mark
        query = query + mark
    return (strength * head_dim**0.5 * query)[None, None], key[None, None]
