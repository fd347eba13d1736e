"""How much attention every key receives, never forming a T×T matrix.

Shapes: b rows, H query heads, K key/value heads, G = H/K, Q queries, N keys, D head_dim.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kvdock.policy import AttentionParams

BLOCK_BYTES = 64 * 2**20
"""Largest float32 block of probabilities in plain torch, whatever the prompt's length."""
QUERY_BLOCK = 512
"""Most queries per block; more would only compute more masked scores."""


def column_sums(
    queries: Tensor, keys: Tensor, params: AttentionParams, lse: Tensor | None = None
) -> Tensor:
    """Sum the probabilities every key receives over all queries and over its group.

    Query r of Q stands at position N − Q + r and sees the keys up to itself.

    Args:
        queries: [b, H, Q, D]. keys: [b, K, N, D], N ≥ Q.
        lse: natural log-sum-exp of every query's scores, float32 [b, H, Q], if known already.

    Returns:
        float32 [b, K, N].
    """
    usual = params.plain and params.scaling > 0
    kernels = _kernels() if queries.is_cuda and usual else None
    if kernels is not None and kernels.serves(queries):
        sums: Tensor = kernels.column_sums(queries, keys, params.scaling, lse)
        return sums
    return reference_column_sums(queries, keys, params)


def reference_column_sums(queries: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Compute `column_sums` in plain torch: a block holds whole rows, so they sum to one."""
    b, h, q, _ = queries.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    group = h // kv_heads
    sums = torch.zeros(b, kv_heads, n, dtype=torch.float32, device=keys.device)
    rows = max(1, min(QUERY_BLOCK, q, BLOCK_BYTES // (4 * group * n or 1)))
    heads = max(1, BLOCK_BYTES // (4 * group * n * rows or 1))
    for row in range(b):
        grouped = queries[row].unflatten(0, (kv_heads, group))
        for first in range(0, kv_heads, heads):
            part = slice(first, first + heads)
            sinks = None if params.sinks is None else params.sinks.view(kv_heads, group)[part]
            for start in range(0, q, rows):
                stop = min(start + rows, q)
                seen = n - q + stop
                sums[row, part, :seen] += _block_sums(
                    grouped[part, :, start:stop], keys[row, part, :seen], params, sinks
                )
    return sums


def step_sums(queries: Tensor, keys: Tensor, valid: Tensor, params: AttentionParams) -> Tensor:
    """Sum the probabilities of one query per row over each group.

    Args:
        queries: [b, H, 1, D]. keys: [b, K, N, D]. valid: bool [b, K, N], True where a slot counts.

    Returns:
        float32 [b, K, N].
    """
    b, h, _, d = queries.shape
    kv_heads = keys.shape[1]
    logits = _logits(queries.reshape(b, kv_heads, h // kv_heads, d), keys, params)
    logits.masked_fill_(~valid[:, :, None], float("-inf"))
    sinks = None if params.sinks is None else params.sinks.view(kv_heads, h // kv_heads)
    return _normalised(logits, sinks).sum(dim=2)


def _block_sums(
    queries: Tensor, keys: Tensor, params: AttentionParams, sinks: Tensor | None
) -> Tensor:
    """Sum over the last queries [k, G, r, D] of keys [k, n, D]; returns [k, n]."""
    k, group, r, d = queries.shape
    n = keys.shape[1]
    logits = _logits(queries.reshape(k, group * r, d), keys, params).view(k, group, r, n)
    future = torch.ones(r, r, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., n - r :].masked_fill_(future, float("-inf"))
    return _normalised(logits, None if sinks is None else sinks[..., None]).sum(dim=(1, 2))


def _normalised(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Turn logits [..., n] into probabilities in place; a sink [...] takes its share of the sum."""
    top = logits.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float()[..., None]
        top = top.maximum(sink)
    weights = logits.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.div_(total if sinks is None else total + (sink - top).exp())


def _logits(queries: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Multiply [..., M, D] by [..., N, D]ᵀ into float32 logits, never rounded to half."""
    if queries.dtype == torch.float32 or not queries.is_cuda:
        logits = queries.float() @ keys.float().transpose(-1, -2)
    else:
        left, right = queries.flatten(0, -3), keys.flatten(0, -3).transpose(-1, -2)
        logits = torch.bmm(left, right, out_dtype=torch.float32)
        logits = logits.view(*queries.shape[:-1], keys.shape[-2])
    logits.mul_(params.scaling)
    if params.softcap is not None:
        logits.div_(params.softcap).tanh_().mul_(params.softcap)
    return logits


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton kernels, or None where Triton cannot be imported."""
    try:
        from kvdock_h2o import kernels
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return kernels
