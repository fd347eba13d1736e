"""Merge evicted values into kept ones, gap by gap.

All evicted entries between two kept ones have the same targets: the next m kept entries. So each
gap is summed once and the sums slide over the kept entries; nothing loops over tokens.

Shapes: b rows, K key/value heads, N entries, C kept entries, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
"""Largest block of weighted values; bounds the extra memory whatever the prompt length."""

COPIES = 16
"""Most partial sums of one gap."""


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
    ahead = window_sums(F.pad(kept, (0, merge - 1)), merge)
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
    entries = max(1, BLOCK_BYTES // (8 * d * b))
    heads, entries = min(max(1, entries // n), kv_heads), min(entries, n)
    # Neighbours mostly add to the same gap and would wait for each other: spread them over copies.
    copies = max(1, min(COPIES, BLOCK_BYTES // (8 * d * b * heads * c)))
    target = gap + c * torch.arange(n, device=gap.device).remainder_(copies)
    place = copies * c * torch.arange(b * heads, device=gap.device).view(b, heads, 1)
    sums = []
    for head in range(0, kv_heads, heads):
        some = slice(head, min(head + heads, kv_heads))
        count = some.stop - head
        partial = values.new_zeros(b, heads, copies, c, d, dtype=torch.float64)
        for start in range(0, n, entries):
            part = slice(None), some, slice(start, start + entries)
            weighted = (values[part] * share[part][..., None]).reshape(-1, d)
            row = (target[part] + place[:, :count]).reshape(-1)
            partial.view(-1, d).index_add_(0, row, weighted)
            del weighted  # before the next block is made
        sums.append(partial[:, :count].sum(dim=2))
    kept = values.gather(2, index[..., None].expand(-1, -1, -1, d))
    behind = F.pad(torch.cat(sums, dim=1), (0, 0, merge - 1, 0))
    return window_sums(behind, merge).add_(kept).to(values.dtype)


def window_sums(terms: Tensor, count: int) -> Tensor:
    """Return Σ terms[i … i + count − 1] along dim 2 for every i where all of them exist.

    Runs of 1, 2, 4, … terms are added up: exact sums without the cancellation of a running total.
    """
    length = terms.shape[2] - count + 1
    total, reach, run, size = None, 0, terms, 1
    while True:
        if count & size:
            part = run[:, :, reach : reach + length]
            total = part if total is None else total + part
            reach += size
        if reach == count:
            assert total is not None
            return total
        run, size = run[:, :, size:] + run[:, :, : run.shape[2] - size], 2 * size
