"""Merge evicted values into kept ones, gap by gap.

All evicted entries between two kept ones have the same targets: the next m kept entries. So each
gap is summed once and the sums slide over the kept entries; nothing loops over tokens.

Shapes: b rows, K key/value heads, N entries, C kept entries, D head_dim.
"""

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
"""Largest block of weighted values; bounds the extra memory whatever the prompt length."""


def gaps(index: Tensor, length: int) -> Tensor:
    """Return how many kept entries come before each entry, int64 [b, K, N].

    Args:
        index: kept entries, ascending, [b, K, C].
    """
    entry = torch.arange(length, device=index.device)
    return torch.searchsorted(index, entry.expand(*index.shape[:2], length).contiguous())


def target_counts(kept: int, merge: int, device: torch.device) -> Tensor:
    """Return m', the targets of each gap: m, fewer at the end; int64 [C]."""
    return (kept - torch.arange(kept, device=device)).clamp(max=merge)


def merge_probability(attention: Tensor, index: Tensor, gap: Tensor, merge: int) -> Tensor:
    """Return p = clamp(Ā_i / mean of the targets' Ā, 0, 1) for every entry, 0 for kept ones.

    Args:
        attention: Ā ≥ 0, float32 [b, K, N].
    """
    kept = attention.gather(2, index)
    ahead = trailing_sum(kept.flip(2), merge).flip(2)
    mean = ahead / target_counts(kept.shape[2], merge, kept.device)
    ratio = (attention / mean.gather(2, gap)).nan_to_num_(nan=0.0, posinf=1.0).clamp_(0, 1)
    return ratio.scatter_(2, index, 0)


def merged_values(
    values: Tensor, weights: Tensor, index: Tensor, gap: Tensor, merge: int
) -> Tensor:
    """Return V_k + Σ_{i evicted, k a target of i} weight_i · V_i / m'_i for the kept entries.

    Sums are in float64, so that the order in which a GPU adds does not show in the result.

    Args:
        values: [b, K, N, D].
        weights: float32 [b, K, N], 0 for kept entries.

    Returns:
        [b, K, C, D] in the dtype of ``values``.
    """
    (b, kv_heads, n, d), c = values.shape, index.shape[2]
    share = weights.double() / target_counts(c, merge, values.device)[gap]
    sums = values.new_zeros(b * kv_heads, c, d, dtype=torch.float64)
    flat = sums.view(-1, d)
    first = torch.arange(b * kv_heads, device=values.device).view(b, kv_heads, 1) * c
    target = gap + first
    entries = max(1, BLOCK_BYTES // (8 * d * b))
    heads, entries = max(1, entries // n), min(entries, n)
    for head in range(0, kv_heads, heads):
        for start in range(0, n, entries):
            part = slice(None), slice(head, head + heads), slice(start, start + entries)
            weighted = values[part] * share[part][..., None]
            flat.index_add_(0, target[part].reshape(-1), weighted.reshape(-1, d))
            del weighted  # before the next block is made
    kept = values.gather(2, index[..., None].expand(-1, -1, -1, d))
    return trailing_sum(sums.view(b, kv_heads, c, d), merge).add_(kept).to(values.dtype)


def trailing_sum(terms: Tensor, count: int) -> Tensor:
    """Return Σ terms[max(0, i − count + 1) … i] along dim 2.

    Runs of 1, 2, 4, … terms are added up: exact sums without the cancellation of a running total.
    """
    count = min(count, terms.shape[2])
    total, reach, run, length = torch.zeros_like(terms), 0, terms, 1
    while length <= count:
        if count & length:
            total = total + _delayed(run, reach)
            reach += length
        run, length = run + _delayed(run, length), 2 * length
    return total


def _delayed(terms: Tensor, by: int) -> Tensor:
    """Move entries back by ``by`` along dim 2, zeros coming in."""
    if by == 0:
        return terms
    moved = torch.zeros_like(terms)
    moved[:, :, by:] = terms[:, :, : terms.shape[2] - by]
    return moved
