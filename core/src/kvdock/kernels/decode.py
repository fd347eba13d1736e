"""Attention of one new query per row over physical slots, in any order, with or without gaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.policy import AttentionParams


@contextmanager
def without_plans(states: Tensor | None) -> Iterator[None]:
    """Keep torch from cuDNN's attention, which plans anew for every length, tens of ms each.

    Nothing changes for states on another device than a GPU, and for None.
    """
    if states is None or not (states.is_cuda and torch.backends.cuda.cudnn_sdp_enabled()):
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def attend_slots(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, params: AttentionParams
) -> Tensor:
    """Attend over every valid slot; order does not matter, RoPE is already in the keys.

    Args:
        query: [B, H, 1, D]. key, value: [B, K, N, D].
        valid: bool [B, K, N], or None when every slot is filled.

    Returns:
        [B, 1, H, D], contiguous.
    """
    if not params.plain:
        return _explicit(query, key, value, valid, params)
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    with without_plans(query):
        if valid is None:
            output = F.scaled_dot_product_attention(
                query, key, value, scale=params.scaling, enable_gqa=heads != kv_heads
            )
            return output.transpose(1, 2).contiguous()
        # The group becomes the query length, so a masked step needs no repeated keys.
        output = F.scaled_dot_product_attention(
            query.reshape(batch, kv_heads, heads // kv_heads, head_dim),
            key,
            value,
            attn_mask=valid[:, :, None, :],
            scale=params.scaling,
        )
    return output.reshape(batch, 1, heads, value.shape[-1])


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, params: AttentionParams
) -> Tensor:
    """Spell the softmax out, for models with soft-capped scores or learned sinks."""
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = (grouped @ key.transpose(-1, -2)).float() * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, None, :], float("-inf"))
    if params.sinks is not None:
        sink = params.sinks.float().view(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).reshape(batch, 1, heads, value.shape[-1])
