"""Attention over keys of two widths with one softmax: in Triton on a GPU, else in plain torch.

Shapes: B rows, H query heads, K key/value heads, Q queries, D head_dim, D' kept channels, Dv
channels of a value, C slots, R slots of the ring. The ring holds the other D − D' channels of a
row's last tokens: those of token t in slot t mod R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@dataclass(slots=True)
class Entries:
    """Hold the entries of some rows.

    Args:
        keys: kept channels of every token, [B, K, C, D'].
        rest: the other channels of the last tokens, [B, K, R, D − D'].
        values: [B, K, C, Dv].
        order: the channels in storage order, kept ones first, int64 [B, K, D].
        live: tokens of each row. start: the first of them that is whole.
        lengths: ``live`` and ``start`` on the device, int32 [2, B]; needed where rows differ.
    """

    keys: Tensor
    rest: Tensor
    values: Tensor
    order: Tensor
    live: list[int]
    start: list[int]
    lengths: Tensor | None = None

    @property
    def even(self) -> bool:
        """Say whether all rows have the same numbers."""
        return len(set(self.live)) == 1 and len(set(self.start)) == 1

    def row(self, index: int) -> Entries:
        """Return one row as views."""
        one = slice(index, index + 1)
        tensors = (self.keys[one], self.rest[one], self.values[one], self.order[one])
        return Entries(*tensors, self.live[one], self.start[one])

    def ring_index(self, first: int, stop: int) -> Tensor:
        """Return the ring's slots of tokens ``first … stop``, int64."""
        tokens = torch.arange(first, stop, device=self.rest.device)
        return tokens % max(self.rest.shape[2], 1)


def attend(
    query: Tensor, entries: Entries, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Attend with every query over all entries of its row, without a mask.

    Args:
        query: [B, H, Q, D].

    Returns:
        [B, H, Q, Dv] in ``dtype``, and the natural log-sum-exps, float32 [B, H, Q].
    """
    kernels = _kernels() if query.is_cuda and scaling > 0 else None
    if kernels is not None and kernels.serves(query, entries):
        found: tuple[Tensor, Tensor] = kernels.attend(query, entries, scaling, dtype)
        return found
    return reference_attend(query, entries, scaling, dtype)


def reference_attend(
    query: Tensor, entries: Entries, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute `attend` in plain torch, in float32."""
    if not entries.even:
        rows = [
            reference_attend(query[i : i + 1], entries.row(i), scaling, dtype)
            for i in range(query.shape[0])
        ]
        return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    live, start = entries.live[0], entries.start[0]
    kept = entries.keys.shape[-1]
    heads = entries.order.shape[1]
    grouped = query.unflatten(1, (heads, -1)).float()  # [B, K, G, Q, D]
    order = entries.order[:, :, None, None].expand(grouped.shape)
    grouped = grouped.gather(-1, order).flatten(2, 3)
    scores = grouped[..., :kept] @ entries.keys[:, :, :live].float().transpose(2, 3)
    if live > start:
        rest = entries.rest.index_select(2, entries.ring_index(start, live)).float()
        scores[..., start:] += grouped[..., kept:] @ rest.transpose(2, 3)
    scores *= scaling
    lse = scores.logsumexp(dim=-1)
    output = (scores - lse[..., None]).exp() @ entries.values[:, :, :live].float()
    shape = query.shape[:3]
    return output.reshape(*shape, output.shape[-1]).to(dtype), lse.reshape(shape)


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton kernels, or None where Triton cannot be imported."""
    try:
        from kvdock_think import kernels
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return kernels
