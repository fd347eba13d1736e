"""Show a layer to its policy, at the prompt's end and at a decode step, as the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvdock.dense import KEY, POSITION, VALUE, DenseStorage
from kvdock.ledger import Ledger
from kvdock.policy import AttentionParams, DecodeView, PrefillView
from kvdock.storage import RowGroup


class LayerViews:
    """Build the views of one layer.

    Args:
        layer, layers: the layer's rank and how many there are.
    """

    def __init__(self, layer: int, layers: int) -> None:
        self.layer = layer
        self.layers = layers
        self.row_state: dict[str, Tensor] = {}
        """The policy's per-row tensors, [B, ...]."""
        self._copies: dict[str, tuple[list[int], Tensor]] = {}

    def prompt(
        self,
        group: RowGroup,
        queries: Tensor | None,
        ledger: Ledger,
        params: AttentionParams,
        *,
        turn: int = 0,
        shared: dict[str, Any] | None = None,
        lse: Tensor | None = None,
    ) -> PrefillView:
        """Show rows of equal length; before the allowance is known, ``slots`` is their length."""
        rows = list(group.rows)
        return PrefillView(
            layer=self.layer,
            layers=self.layers,
            slots=ledger.slots[rows[0]] if ledger.slots else group.length,
            queries=queries,
            keys=group.keys,
            values=group.values,
            positions=group.positions,
            params=params,
            turn=turn,
            rows=group.rows,
            slot_state=group.slot_state,
            row_state={name: state[rows] for name, state in self.row_state.items()},
            shared={} if shared is None else shared,
            lse=lse,
        )

    def step(
        self,
        query: Tensor,
        storage: DenseStorage,
        ledger: Ledger,
        over: list[bool],
        params: AttentionParams,
        shared: dict[str, Any],
    ) -> DecodeView:
        """Show all slots right after a decode step's attention."""
        return DecodeView(
            layer=self.layer,
            layers=self.layers,
            queries=query,
            keys=storage.view(KEY),
            values=storage.view(VALUE),
            positions=storage.view(POSITION),
            over=self._on_device("over", over, query.device),
            slots=self._on_device("slots", ledger.slots, query.device),
            params=params,
            slot_state=storage.slot_state(),
            row_state=self.row_state,
            shared=shared,
        )

    def keep(self, rows: Sequence[int], states: dict[str, Tensor], batch: int) -> None:
        """Write a policy's new per-row tensors for some rows."""
        for name, state in states.items():
            if name not in self.row_state:
                self.row_state[name] = state.new_zeros(batch, *state.shape[1:])
            written = self.row_state[name].clone()  # a policy may give all its layers one tensor
            written[list(rows)] = state
            self.row_state[name] = written

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        for name, state in self.row_state.items():
            self.row_state[name] = state.index_select(0, index.to(state.device))

    def _on_device(self, name: str, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return host numbers as a tensor, copied only when they change (seldom, step by step)."""
        known = self._copies.get(name)
        if known is None or known[0] != list(rows):
            known = (list(rows), torch.tensor(rows, device=device))
            self._copies[name] = known
        return known[1]
