"""Sliding-window attention for layers kvdock leaves alone, in blocks and never with a T×T mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.kernels.decode import without_plans
from kvdock.policy import AttentionParams

QUERY_BLOCK = 512


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    window: int,
    seen: int,
    mask: Tensor | None,
) -> Tensor:
    """Attend with Q new columns over the last N columns, pads included and masked.

    Args:
        query: [B, H, Q, D]; key, value: [B, K, N, D], the last N of ``seen + Q`` columns.
        window: each column sees itself and the ``window − 1`` before it.
        mask: bool [B, seen + Q], or None when no column is a pad.

    Returns:
        [B, Q, H, D], contiguous.
    """
    q_length, k_length = query.shape[2], key.shape[2]
    first_key = seen + q_length - k_length
    blocks = []
    for start in range(0, q_length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_length)
        low = max(0, seen + start - window + 1 - first_key)
        high = seen + stop - first_key
        rows = torch.arange(seen + start, seen + stop, device=query.device)[:, None]
        columns = torch.arange(first_key + low, first_key + high, device=query.device)[None, :]
        visible = ((columns <= rows) & (columns > rows - window))[None, None]
        if mask is not None:
            real = mask[:, first_key + low : first_key + high].to(query.device)
            # A pad sees itself, so that no row of the softmax is empty.
            visible = (visible & real[:, None, None, :]) | (columns == rows)
        blocks.append(
            _attend(query[:, :, start:stop], key, value, slice(low, high), visible, params)
        )
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, span: slice, visible: Tensor, params: AttentionParams
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key = key[:, :, span].repeat_interleave(group, 1)
    value = value[:, :, span].repeat_interleave(group, 1)
    if params.plain:
        with without_plans(query if query.shape[2] == 1 else None):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=visible, scale=params.scaling
            )
    scores = (query @ key.transpose(-1, -2)) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if params.sinks is not None:
        sink = params.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
