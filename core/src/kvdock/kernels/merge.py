"""Attention over two sets of keys as one, by the log-sum-exps of their scores.

Shapes: b rows, H query heads, K key/value heads, Q queries, N keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.kernels import DenseBackend
from kvdock.policy import AttentionParams

QUERY_BLOCK = 256
"""Queries per block where a kernel gives no log-sum-exps: scores are [b, K, G, 256, N]."""


def merge_states(left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor) -> Tensor:
    """Combine two partial outputs: softmax over both sets = Σ exp(lseᵢ − lse) · outputᵢ.

    Args:
        left, right: [b, H, Q, D].
        left_lse, right_lse: natural, float32 [b, H, Q]; −∞ where a set is empty.

    Returns:
        float32 [b, H, Q, D].
    """
    total = torch.logaddexp(left_lse, right_lse)[..., None]
    shares = [(lse[..., None] - total).exp() for lse in (left_lse, right_lse)]
    return shares[0] * left.float() + shares[1] * right.float()


def attend_lse(
    backend: DenseBackend, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Attend causally, the last query aligned with the last key, and return log-sum-exps too.

    Args:
        query: [b, H, Q, D]. key, value: [b, K, N, D].

    Returns:
        [b, H, Q, D] and the natural log-sum-exps, float32 [b, H, Q].
    """
    output, lse = backend.attend_lse(query, key, value, params)
    if lse is not None:
        return output.transpose(1, 2), lse.float()
    b, h, q_length, d = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    grouped = query.reshape(b, kv_heads, h // kv_heads, q_length, d)
    outputs, sums = [], []
    for start in range(0, q_length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_length)
        end = n - q_length + stop
        scores = torch.einsum("bkgqd,bknd->bkgqn", grouped[..., start:stop, :], key[:, :, :end])
        scores = scores.float() * params.scaling
        future = torch.ones(stop - start, end, dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(future.triu(end - (stop - start) + 1), float("-inf"))
        sums.append(scores.logsumexp(dim=-1))
        weights = (scores - sums[-1][..., None]).exp().to(value.dtype)
        outputs.append(torch.einsum("bkgqn,bknd->bkgqd", weights, value[:, :, :end]))
    joined = torch.cat(outputs, dim=3).reshape(b, h, q_length, value.shape[-1])
    return joined, torch.cat(sums, dim=3).reshape(b, h, q_length)
