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


@dataclass(frozen=True, slots=True)
class Cursor:
    """Say on the device what rows hold, where the host must not decide.

    Args:
        live: tokens of each row, int32 [B].
        start: the first whole token when the row was shorter, int32 [B].
        longest: the most tokens of a row.
        most: whole tokens a row may have. block: how many become narrow at a time.
    """

    live: Tensor
    start: Tensor
    longest: int
    most: int
    block: int

    @classmethod
    def of(cls, entries: Entries) -> Cursor:
        """Return the numbers of the entries as they are."""
        assert entries.lengths is not None
        longest = max(entries.live)
        return cls(entries.lengths[0], entries.lengths[1], longest, longest, 1)

    @property
    def whole(self) -> Tensor:
        """Return each row's first whole token now, int64 [B]."""
        start = self.start.long()
        excess = (self.live.long() - start - self.most).clamp_min(0)
        return start + (excess + self.block - 1) // self.block * self.block


def attend(
    query: Tensor, entries: Entries, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Attend with every query over all entries of its row, without a mask.

    Args:
        query: [B, H, Q, D].

    Returns:
        [B, H, Q, Dv] in ``dtype``, and the natural log-sum-exps, float32 [B, H, Q].
    """
    kernels = kernels_for(query, entries, scaling)
    if kernels is not None:
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


def fixed_attend(query: Tensor, entries: Entries, cursor: Cursor, scaling: float) -> Tensor:
    """Attend with one query per row over all slots, masking what the cursor says is not there.

    Args:
        query: [B, H, 1, D].

    Returns:
        float32 [B, H, 1, Dv].
    """
    heads, kept = entries.order.shape[1], entries.keys.shape[-1]
    grouped = query.unflatten(1, (heads, -1)).squeeze(3).float()  # [B, K, G, D]
    grouped = grouped.gather(-1, entries.order[:, :, None].expand(grouped.shape))
    token = torch.arange(entries.keys.shape[2], device=query.device)
    seen = (token < cursor.live[:, None])[:, None, None]
    whole = (token >= cursor.whole[:, None])[:, None, None]
    # empty slots were never written, so that they may hold any number
    rest = grouped[..., kept:] @ entries.rest.float().transpose(2, 3)
    scores = grouped[..., :kept] @ entries.keys.float().transpose(2, 3)
    scores = scores + rest[..., token % rest.shape[-1]].where(whole, 0.0)
    scores = (scores * scaling).masked_fill(~seen, float("-inf"))
    values = entries.values.float().where(seen.squeeze(2)[..., None], 0.0)
    output = scores.softmax(dim=-1) @ values
    return output.reshape(*query.shape[:3], values.shape[-1])


def kernels_for(query: Tensor, entries: Entries, scaling: float) -> ModuleType | None:
    """Return the module of the Triton kernels where they serve, on an NVIDIA GPU."""
    kernels = _kernels() if query.is_cuda and scaling > 0 else None
    return kernels if kernels is not None and kernels.serves(query, entries) else None


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton kernels, or None where Triton cannot be imported."""
    try:
        from kvdock_think import kernels
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return kernels
