"""One decode step over slots whose number is fixed and whose use only the device knows.

Shapes: B rows, H query heads, K key/value heads, N physical slots, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.kernels.decode import attend_slots
from kvdock.policy import AttentionParams


def append_slots(
    table: dict[str, Tensor],
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    used: Tensor,
    released: Tensor | None,
    hole: Tensor | None,
) -> None:
    """Write one token per row behind its entries, or into the slot it gave up before.

    Args:
        table: "key", "value", "position" and a policy's per-entry tensors, [B, K, N, ...]; the
            latter start at zero.
        key, value: [B, K, 1, D]. tokens, used: int64 [B]: position and end of every row.
        released, hole: int64 [B, K] and bool [B]; None where rows never give a slot up.
    """
    batch, heads = key.shape[:2]
    cursor = used[:, None].expand(batch, heads)
    if released is not None and hole is not None:
        cursor = torch.where(hole[:, None], released, cursor)
    position = tokens.to(torch.int32)[:, None, None].expand(batch, heads, 1)
    new = {"key": key, "value": value, "position": position}
    for name, tensor in table.items():
        source = new.get(name)
        if source is None:
            source = tensor.new_zeros(batch, heads, 1, *tensor.shape[3:])
        index = cursor.view(batch, heads, 1, *[1] * (tensor.dim() - 3)).expand_as(source)
        tensor.scatter_(2, index, source)


def attend_frozen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    used: Tensor | None,
    params: AttentionParams,
) -> Tensor:
    """Attend over the filled slots, after a token was appended to them.

    Args:
        query: [B, H, 1, D]. key, value: [B, K, N, D]. position: int32 [B, K, N], −1 = empty.
        used: int64 [B] where a row fills its first ``used + 1`` slots; None where any may be empty.

    Returns:
        [B, 1, H, D], contiguous.
    """
    return attend_slots(query, key, value, position >= 0, params)
