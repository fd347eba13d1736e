"""A decode step of fixed shape over a storage of a method's own: packed codes, narrow keys.

Shapes: L layers, B rows, K key/value heads, H query heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvdock.formatted import FormattedStore
from kvdock.policy import AttentionParams


class FormCursors:
    """Say on the device, for all layers at once, how many entries each row holds.

    ``before`` and ``after`` a step's token, int32 [L, B]; ``tokens``, its position, int64 [B].
    """

    def __init__(self, stores: Sequence[FormattedStore]) -> None:
        device = stores[0].shape.device
        live = [store.storage.live for store in stores]
        self.before = torch.tensor(live, dtype=torch.int32, device=device)
        self.after = self.before + 1
        self.tokens = torch.tensor(stores[0].ledger.tokens, device=device)

    def begin(self) -> None:
        """Do nothing: every row takes a token, and none gives one up."""

    def end(self) -> None:
        """Move on after a step of all layers."""
        self.before.add_(1)
        self.after.add_(1)
        self.tokens.add_(1)


class FrozenForm:
    """Run one layer's part of a decode step on tensors alone."""

    def __init__(self, store: FormattedStore, rank: int, cursors: FormCursors) -> None:
        self.store = store
        self._cursors, self._rank = cursors, rank
        self._steps = store.form.freeze(store.ledger.capacity)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        shared: dict[str, Any],
    ) -> Tensor:
        """Append one token per row and attend: [B, H, 1, D] → [B, 1, H, D]."""
        cursors, rank = self._cursors, self._rank
        self._steps.append(key, value, cursors.tokens, cursors.before[rank])
        return self._steps.attend(query, cursors.after[rank], params)

    def advance(self) -> None:
        """Count the step on the host."""
        self.store.columns += 1
        self.store.ledger.advance()
        self.store.form.advance()

    def thaw(self) -> None:
        """Do nothing: the storage's own numbers are the host's."""
