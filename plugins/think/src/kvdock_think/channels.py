"""Which key channels matter (equation 4 of the paper), on key/value heads.

Shapes: b rows, H query heads, K key/value heads, G = H/K, W window queries, N entries, D head_dim.
"""

import math

import torch
from torch import Tensor

ALIGNMENT = 16
"""Kept channels are a multiple of this: whole 32-byte loads, and the depth of a tensor core."""


def kept_channels(head_dim: int, ratio: float) -> int:
    """Return D' = D − ⌊D·λ⌋, rounded up to a multiple of 16, at most D.

    Up, so that never more is dropped than was asked for. Heads of less than 64 channels have a
    quarter of the head as their multiple.
    """
    multiple = min(ALIGNMENT, max(1, head_dim // 4))
    kept = head_dim - math.floor(head_dim * ratio)
    return min(head_dim, -(-kept // multiple) * multiple)


def channel_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Rate every channel i by ‖q_i k_iᵀ‖²_F, up to a constant, in float32.

    The norm of a product of a column and a row is the product of their norms, so that no matrix is
    formed: the mean of q² over the window and the group, times the mean of k² over the entries.

    Args:
        queries: [b, H, W, D]. keys: [b, K, N, D].

    Returns:
        float32 [b, K, D].
    """
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    query_norm = torch.linalg.vector_norm(grouped, dim=(2, 3), dtype=torch.float32)
    key_norm = torch.linalg.vector_norm(keys, dim=2, dtype=torch.float32)
    query_energy = query_norm.square() / (grouped.shape[2] * grouped.shape[3])
    return query_energy * (key_norm.square() / keys.shape[2])
