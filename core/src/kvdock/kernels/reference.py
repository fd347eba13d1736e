"""Dense attention in plain torch, one block of queries at a time; the yardstick of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.policy import AttentionParams

QUERY_BLOCK = 1024
"""Queries per block: scores are [b, H, 1024, N] at most, never T×T for long prompts."""


class ReferenceBackend:
    """Attend with explicit scores and a float32 softmax; knows soft-capping and sinks."""

    name = "reference"
    ragged = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Attend causally, the last query aligned with the last key.

        Args:
            query: [b, H, Q, D].
            key, value: [b, K, N, D], N ≥ Q.

        Returns:
            [b, Q, H, D], contiguous.
        """
        q_length, k_length = query.shape[2], key.shape[2]
        output = query.new_empty(query.shape[0], q_length, query.shape[1], value.shape[-1])
        for start in range(0, q_length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q_length)
            end = k_length - q_length + stop
            block = _block(query[:, :, start:stop], key[:, :, :end], value[:, :, :end], params)
            output[:, start:stop] = block.transpose(1, 2)
        return output

    def attend_lse(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        """Attend without log-sum-exps."""
        return self.attend(query, key, value, params), None


def _block(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * params.scaling
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    q, n = scores.shape[-2:]
    future = torch.ones(q, n, dtype=torch.bool, device=query.device).triu(n - q + 1)
    scores = scores.masked_fill(future, float("-inf"))
    if params.sinks is not None:
        column = params.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :n].to(query.dtype)
    return torch.matmul(weights, value)
