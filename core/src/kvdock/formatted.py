"""A layer whose kept entries stand in a form of a method's own: packed codes, narrow keys.

A prompt's states wait as the model made them until the prompt ends, so that its own attention is
exact however it is cut into chunks; then tokens are selected, channels chosen, and the rest stored.

Shapes: B rows, H query heads, K key/value heads, Q new columns, N entries, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvdock.dense import KEY, POSITION, VALUE, DenseStorage
from kvdock.gather import gather
from kvdock.kernels.merge import attend_lse, merge_states
from kvdock.layer import LayerStore
from kvdock.layout import BatchLayout
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams
from kvdock.storage import PolicyStorage, RowGroup
from kvdock.storage_policy import StoreShape


class FormattedStore(LayerStore):
    """Run prefill and decode of one managed layer whose storage a `StoragePolicy` brings."""

    def __init__(self, plan: DockPlan, rank: int) -> None:
        super().__init__(plan, rank)
        assert plan.storage_policy is not None
        self.form: PolicyStorage = plan.storage_policy.make_storage()
        self.storage = self.form
        self._shape: StoreShape | None = None

    @property
    def shape(self) -> StoreShape:
        """Describe what is stored."""
        assert self._shape is not None
        return replace(self._shape, batch=len(self.ledger.tokens))

    @property
    def expected_nbytes(self) -> int:
        """Return the bytes of keys and values by the storage policy's formula."""
        assert self.plan.storage_policy is not None
        return self.plan.storage_policy.predicted_nbytes(self.shape, self.ledger.capacity)

    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: BatchLayout,
        params: AttentionParams,
        *,
        room: int,
    ) -> Tensor:
        """Attend with a forward of a prompt and hold its states as they are until its end."""
        self.plan.check_formatted(params)
        # of a later turn only the new tokens wait here
        room = room if self.form.empty else room - self.columns + layout.columns
        return super().extend(query, key, value, layout, params, room=room)

    def _attend_stored(
        self, query: Tensor, layout: BatchLayout, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        if self.form.empty:
            return super()._attend_stored(query, layout, params)
        rows = list(range(layout.batch))
        if layout.spans is None and self.form.even and len(set(self.dense.used)) == 1:
            group = RowGroup(
                tuple(rows),
                self.dense.view(KEY),
                self.dense.view(VALUE),
                self.dense.view(POSITION),
            )
            if self.plan.attention_policy is None:
                return self._attend_both(query, group, params), None
        output = query.new_zeros(
            query.shape[0], query.shape[2], query.shape[1], self.shape.value_dim
        )
        for span in layout.row_spans:
            if span.count:
                span.put(output, self._attend_row(span.take(query), span.row, params))
        return output, None

    def _attend_row(self, query: Tensor, row: int, params: AttentionParams) -> Tensor:
        """Attend for one row; a sparse prefill sees its whole past as the model would make it."""
        new = self.dense.row(row)
        if self.plan.attention_policy is None:
            return self._attend_both(query, new, params)
        old = self.form.row(row)
        keys = torch.cat([old.keys, new.keys], dim=2)
        values = torch.cat([old.values, new.values], dim=2)
        return self.plan.prefill(query, keys, values, params, self.rank)[0]

    def _attend_both(self, query: Tensor, new: RowGroup, params: AttentionParams) -> Tensor:
        """Merge attention over what is stored and over this turn's tokens: [b, Q, H, D]."""
        past, past_lse = self.form.attend_past(query, new.rows, params)
        own, own_lse = attend_lse(self.plan.backend, query, new.keys, new.values, params)
        merged = merge_states(past, past_lse, own, own_lse)
        return merged.to(query.dtype).transpose(1, 2).contiguous()

    def finish(self, turn: int, shared: dict[str, Any]) -> None:
        """End the prompt: select tokens, choose channels, store the rest in the policy's form."""
        if not self._waiting:
            self._waiting = [(self.dense.row(row), tail) for row, tail in enumerate(self._tails)]
        first = self.form.empty
        if first:
            self._set_slots()
        waiting, self._waiting = self._waiting, []
        if first:
            entries = {row: group.length for group, _ in waiting for row in group.rows}
            kept = [
                (gather(group, self._select(group, tail, turn, shared)), tail)
                for group, tail in waiting
            ]
            self.ledger.compressed([entries[row] for row in range(len(entries))])
            groups = [self._with_channels(group, tail) for group, tail in kept]
            ordered = self.plan.cache_policy is None
            one = groups[0]
            self._shape = StoreShape.of(
                one.keys, one.values, batch=len(entries), channels=one.channels, ordered=ordered
            )
            self.form.fill(groups, self.ledger.capacity, ordered=ordered)
        else:
            self.ledger.kept_turn()
            self.form.append([group for group, _ in waiting], self.ledger.capacity)
        self.dense = DenseStorage()
        self.open, self._tails = False, []

    def _with_channels(self, group: RowGroup, tail: Tensor | None) -> RowGroup:
        policy = self.plan.channel_policy
        if policy is None:
            return group
        assert self._params is not None
        queries = self._last(tail, policy.query_window, group.rows[0])
        view = self.views.prompt(group, queries, self.ledger, self._params)
        return replace(group, channels=policy.select_channels(view))
