"""Decode steps over narrow and whole keys in fixed shapes: lengths are read from the device.

Shapes: B rows, K key/value heads, H query heads, C slots, D head_dim, D' kept channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.policy import AttentionParams
from kvdock.storage import FixedSteps
from kvdock_think.attention import Cursor, Entries, fixed_attend, kernels_for


class ThinKSteps(FixedSteps):
    """Append to and attend over one layer's entries.

    Which tokens are whole follows from a row's length and its first whole token at the start, so
    that a block becomes narrow without a word from the host.

    Args:
        table: of positions, int32 [B, K, C]; None where they follow from the lengths.
        recent, block: as the method's options.
    """

    def __init__(self, entries: Entries, table: Tensor | None, recent: int, block: int) -> None:
        self._entries, self._table = entries, table
        self._most, self._block = recent + block, block
        device = entries.keys.device
        self._start = torch.tensor(entries.start, dtype=torch.int32, device=device)

    def append(self, key: Tensor, value: Tensor, positions: Tensor, lengths: Tensor) -> None:
        """Write one whole token per row."""
        held = self._entries
        if kernels_for(key, held, 1.0) is not None:
            from kvdock_think import append_kernel

            append_kernel.append(held, key, value, lengths)
        else:
            append(held, key, value, lengths)
        if self._table is not None:
            slot = lengths.long()[:, None, None].expand(-1, self._table.shape[1], 1)
            self._table.scatter_(2, slot, positions.int()[:, None, None].expand_as(slot))

    def attend(self, query: Tensor, lengths: Tensor, params: AttentionParams) -> Tensor:
        """Attend with one query per row: [B, H, 1, D] → [B, 1, H, Dv]."""
        held = self._entries
        cursor = Cursor(lengths, self._start, held.keys.shape[2], self._most, self._block)
        kernels = kernels_for(query, held, params.scaling)
        if kernels is not None:
            output, _ = kernels.attend(query, held, params.scaling, query.dtype, cursor=cursor)
        else:
            output = fixed_attend(query, held, cursor, params.scaling).to(query.dtype)
        return output.transpose(1, 2)


def append(entries: Entries, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    """Put one token per row, [B, K, 1, D], behind ``lengths`` others, int32 [B]."""
    kept, ring = entries.keys.shape[-1], entries.rest.shape[2]
    turned = key.gather(3, entries.order[:, :, None])
    slot = lengths.long()[:, None, None, None]
    for target, new, at in (
        (entries.keys, turned[..., :kept], slot),
        (entries.values, value, slot),
        (entries.rest, turned[..., kept:], slot % ring),
    ):
        target.scatter_(2, at.expand_as(new), new)
