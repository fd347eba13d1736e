"""Show a layer to its policy, at the prompt's end and at a decode step, as the contract says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        device = query.device
        gone = self._on_device("over", over, device)
        allowed = self._on_device("slots", ledger.slots, device)
        return self.slots(query, storage.in_use, gone, allowed, params, shared)

    def slots(
        self,
        query: Tensor,
        table: Mapping[str, Tensor],
        over: Tensor,
        slots: Tensor,
        params: AttentionParams,
        shared: dict[str, Any],
    ) -> DecodeView:
        """Show a table of slots, with what the device knows of the rows: bool [B], int64 [B]."""
        return DecodeView(
            layer=self.layer,
            layers=self.layers,
            queries=query,
            keys=table[KEY],
            values=table[VALUE],
            positions=table[POSITION],
            over=over,
            slots=slots,
            params=params,
            slot_state={name: table[name] for name in table.keys() - {KEY, VALUE, POSITION}},
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

    def rewrite(self, states: dict[str, Tensor]) -> None:
        """Write per-row tensors in place, where the next step looks for them."""
        for name, state in states.items():
            if name in self.row_state:
                self.row_state[name].copy_(state)
            else:
                self.row_state[name] = state.clone()

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
