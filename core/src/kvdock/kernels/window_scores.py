"""Attention probabilities of the observation window, and the selection they vote for.

Shapes: b rows, H query heads, K key/value heads, G = H/K, W window queries, N keys, D head_dim,
C kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels.selection import top_positions
from kvdock.policy import AttentionParams, PrefillView, Selection

BLOCK_BYTES = 64 * 2**20
"""Largest float32 probability block; bounds the extra memory whatever the prompt length."""


def window_probabilities(
    queries: Tensor, keys: Tensor, params: AttentionParams, valid: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(heads, probabilities [b, k, G, W, N])`` over slices of the key/value heads.

    Row r of the window stands at position N − W + r and sees the keys up to itself. Products
    accumulate in float32 and the softmax stays in float32.

    Args:
        queries: the last W queries, [b, H, W, D].
        keys: all keys they may see, [b, K, N, D].
        valid: which keys count, bool [b, K, N]; all of them when None.
    """
    b, h, w, d = queries.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    group = h // kv_heads
    grouped = queries.reshape(b, kv_heads, group * w, d)
    future = None  # one query, as in a decode step, comes after every key
    if w > 1:
        future = torch.ones(w, w, dtype=torch.bool, device=keys.device).triu(1)
    step = max(1, BLOCK_BYTES // (b * group * w * n * 4))
    for start in range(0, kv_heads, step):
        heads = slice(start, min(start + step, kv_heads))
        part, sinks = None if valid is None else valid[:, heads], params.sinks
        # logits have no name here: nothing but the result stays while the caller works on it
        yield (
            heads,
            _softmax(
                _logits(grouped[:, heads], keys[:, heads], params, w, future, part),
                sinks,
                heads,
                group,
            ),
        )


def window_votes(queries: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
    """Sum the window's probabilities over its queries and average over each group.

    SnapKV's votes: v[b, k, j] = mean_g Σ_r A[b, g, r, j].

    Returns:
        float32 [b, K, N].
    """
    votes = [
        block.sum(dim=3).mean(dim=2) for _, block in window_probabilities(queries, keys, params)
    ]
    return torch.cat(votes, dim=1)


def pooled(votes: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool votes [b, K, N] along the sequence; "max" pads with −∞, "avg" with zeros.

    Args:
        kernel: odd width.
    """
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return pool(votes, kernel, stride=1, padding=kernel // 2)


def keep_window(view: PrefillView, *, kernel: int, pooling: str) -> Selection:
    """Keep the window and the prefix entries with the highest pooled votes.

    The window is ``view.queries``, shortened where the allowance would leave no prefix entry.

    Returns:
        C = ``view.slots`` entries of every key/value head; ties go to the lower position.
    """
    if view.queries is None or view.queries.shape[2] == 0:
        raise UnsupportedError(
            f"row {view.rows[0]} brings no token in turn {view.turn}, so no query can vote on what"
            " it keeps. Give every row a token in every turn, or use recompress=False."
        )
    window = max(1, min(view.queries.shape[2], view.slots - 1))
    queries = view.queries[:, :, view.queries.shape[2] - window :]
    prefix = view.length - window
    votes = window_votes(queries, view.keys, view.params)[..., :prefix]
    chosen = top_positions(pooled(votes, kernel, pooling), view.slots - window)
    recent = torch.arange(prefix, view.length, device=chosen.device)
    return Selection(torch.cat([chosen, recent.expand(*chosen.shape[:-1], window)], dim=-1))


def _logits(
    grouped: Tensor,
    keys: Tensor,
    params: AttentionParams,
    w: int,
    future: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """Return the scaled, capped and masked products, float32 [b, k, G, W, N]."""
    b, heads, rows, _ = grouped.shape
    n = keys.shape[2]
    logits = _product(grouped, keys).mul_(params.scaling)
    if params.softcap is not None:
        logits = logits.div_(params.softcap).tanh_().mul_(params.softcap)
    logits = logits.view(b, heads, rows // w, w, n)
    if future is not None:
        logits[..., n - w :].masked_fill_(future, float("-inf"))
    if valid is not None:
        logits.masked_fill_(~valid[:, :, None, None], float("-inf"))
    return logits


def _product(query: Tensor, key: Tensor) -> Tensor:
    """Multiply [b, k, M, D] by [b, k, N, D]ᵀ with a float32 result, never rounding to half."""
    if query.dtype == torch.float32:
        return query @ key.transpose(-1, -2)
    if query.is_cuda:
        left, right = query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2)
        product = torch.bmm(left, right, out_dtype=torch.float32)
        return product.view(*query.shape[:3], key.shape[2])
    return query.float() @ key.float().transpose(-1, -2)


def _softmax(logits: Tensor, sinks: Tensor | None, heads: slice, group: int) -> Tensor:
    if sinks is None:
        return logits.softmax(dim=-1)
    sink = sinks.float().view(-1, group)[heads].view(1, -1, group, 1, 1)
    column = sink.expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
