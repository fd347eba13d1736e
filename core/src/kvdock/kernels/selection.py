"""Pick the best-scored entries the same way on every device: ties go to the lower position."""

from __future__ import annotations

import torch
from torch import Tensor


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` highest scores, ascending.

    ``torch.topk`` leaves the order of equal scores open and pooling makes plateaus of them, so the
    choice is made on a 64-bit key: the score's order-preserving bits, then the lower position.

    Args:
        scores: [..., N], compared in float32; infinities are ordered too, NaN is not.
        count: how many to take, 0 ≤ count ≤ N.

    Returns:
        int64 [..., count].
    """
    length = scores.shape[-1]
    if count >= length:
        return torch.arange(length, device=scores.device).expand(*scores.shape[:-1], length)
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # −0 + 0 = 0: the two are equal
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats order backwards
    position = torch.arange(length, device=scores.device)
    key = (bits.to(torch.int64) << 32) | (0xFFFFFFFF - position)
    index = key.topk(count, dim=-1, sorted=False).indices
    return index.sort(dim=-1).values
