"""Dense attention through torch's scaled_dot_product_attention (cuDNN, flash or efficient)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right

from kvdock.policy import AttentionParams

QUERY_BLOCK = 512
"""Queries per mask where a kernel has no bottom-right causal form (CPU)."""


class SDPABackend:
    """Call the same function, with the same arguments, as transformers' ``sdpa``."""

    name = "sdpa"
    ragged = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Attend causally, the last query aligned with the last key; shapes as in ``reference``."""
        q_length, k_length = query.shape[2], key.shape[2]
        if q_length == k_length or q_length == 1:
            output = _sdpa(query, key, value, params, is_causal=q_length > 1)
        elif query.is_cuda:
            bias = causal_lower_right(q_length, k_length)
            output = _sdpa(query, key, value, params, mask=bias)
        else:
            output = _blocked(query, key, value, params)
        return output.transpose(1, 2).contiguous()

    def attend_lse(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `attend` does, by the kernel it would choose, where that gives the sums too."""
        found = _fused_lse(query, key, value, params) if query.shape[2] == key.shape[2] else None
        if found is None:
            return self.attend(query, key, value, params), None
        output, lse = found
        return output.transpose(1, 2).contiguous(), lse.reshape(query.shape[:3])


def _fused_lse(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor] | None:
    """Run the kernel behind scaled_dot_product_attention itself, which does not pass these on."""
    if query.shape[-1] % 8:  # padded there before the call
        return None
    states, causal = (query, key, value), query.shape[2] > 1
    choice = torch._fused_sdp_choice(
        *states,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=causal,
        scale=params.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    kernels, scale = torch.ops.aten, params.scaling
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        output, lse, *_ = kernels._scaled_dot_product_cudnn_attention(
            *states, None, True, 0.0, causal, scale=scale
        )
    elif choice != SDPBackend.FLASH_ATTENTION.value:
        return None
    elif query.is_cuda:
        output, lse, *_ = kernels._scaled_dot_product_flash_attention(
            *states, 0.0, causal, scale=scale
        )
    elif query.device.type == "cpu":
        output, lse = kernels._scaled_dot_product_flash_attention_for_cpu(
            *states, 0.0, causal, scale=scale
        )
    else:
        return None
    return output, lse


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=params.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _blocked(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    q_length, k_length = query.shape[2], key.shape[2]
    blocks = []
    for start in range(0, q_length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_length)
        end = k_length - q_length + stop
        mask = torch.ones(stop - start, end, dtype=torch.bool, device=query.device)
        mask = mask.tril(end - (stop - start))
        blocks.append(
            _sdpa(query[:, :, start:stop], key[:, :, :end], value[:, :, :end], params, mask=mask)
        )
    return torch.cat(blocks, dim=2)
