"""A decode step of fixed shape: cursors, positions and validity on the device, no host decision.

Every layer's entries stand in slots allocated ahead. A step reads nothing but tensors, so the same
kernels run step after step and can be captured as a CUDA graph; the host counts along by `advance`.

Shapes: L layers, B rows, K key/value heads, H query heads, N physical slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvdock.dense import KEY, POSITION, VALUE
from kvdock.formatted import FormattedStore
from kvdock.frozen_form import FormCursors, FrozenForm
from kvdock.frozen_release import FusedRelease, fused_release
from kvdock.kernels.slots import (
    BOUNDED,
    Form,
    append_kernel,
    append_slots,
    attend_filled,
    counters,
    tried,
)
from kvdock.layer import LayerStore
from kvdock.policy import AttentionParams


class Cursors:
    """Say on the device, for all layers at once, where each row writes and what it holds.

    ``used``, ``live``, ``slots`` are int64 [L, B]; ``hole``, ``over`` bool [L, B]; ``tokens``
    int64 [B].
    """

    def __init__(self, stores: Sequence[LayerStore]) -> None:
        device = stores[0].dense.table[KEY].device

        def stacked(rows: list[list[Any]]) -> Tensor:
            return torch.tensor(rows, device=device)

        self.used = stacked([store.dense.used for store in stores])
        self.live = stacked([store.dense.live for store in stores])
        self.hole = stacked([store.dense.holes for store in stores])
        self.slots = stacked([store.ledger.slots for store in stores])
        self.tokens = stacked([stores[0].ledger.tokens])[0]
        self.over = torch.zeros_like(self.hole)
        self.bounded = stores[0].ledger.bounded
        batch, heads = stores[0].dense.table[KEY].shape[:2]
        self.arrived = counters(batch, heads, device)
        self.fused: FusedRelease | None = None
        """What gives entries up by one kernel a layer; None where the policy itself does."""

    def begin(self) -> None:
        """Tell, before a step, which rows will hold more than their allowance."""
        torch.ge(self.live, self.slots, out=self.over)
        if self.fused is not None:
            self.fused.begin()

    def end(self) -> None:
        """Move on after a step of all layers; the slot a row gave up is where it writes next."""
        if self.fused is not None:
            self.fused.end()
        self.tokens.add_(1)
        if self.bounded:
            self.used.add_(~self.hole)
            self.live.add_(~self.over)
            self.hole.copy_(self.over)
        else:
            self.used.add_(1)
            self.live.add_(1)


class FrozenLayer:
    """Run one layer's part of a decode step on tensors alone."""

    def __init__(self, store: LayerStore, rank: int, cursors: Cursors) -> None:
        self.store = store
        self._cursors, self._rank = cursors, rank
        dense = store.dense
        batch, heads = dense.table[KEY].shape[:2]
        released = dense.released
        if released is None:
            released = dense.table[KEY].new_zeros(batch, heads, dtype=torch.int64)
        self._released = released.clone()
        rows = store.views.row_state
        rows.update({name: state.clone() for name, state in rows.items()})

    @property
    def released(self) -> Tensor:
        """Return the slots given up last, int64 [B, K]."""
        return self._released

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        shared: dict[str, Any],
    ) -> Tensor:
        """Append one token per row, attend, and let a policy that acts on decode release."""
        cursors, rank, store = self._cursors, self._rank, self.store
        policy, dense = store.plan.cache_policy, store.dense
        used = cursors.used[rank]
        released, hole = (self._released, cursors.hole[rank]) if cursors.bounded else (None, None)
        table, fused = dense.table, cursors.fused
        written = table if fused is None else {name: table[name] for name in (KEY, VALUE, POSITION)}
        append_slots(written, key, value, cursors.tokens, used, released, hole)
        output = attend_filled(
            query, table[KEY], table[VALUE], params,
            position=table[POSITION] if cursors.bounded else None,  # else no slot is given up
            used=used, arrived=cursors.arrived,
            told=None if fused is None else fused.told(rank, query, table[KEY]),
        )  # fmt: skip
        if fused is not None:
            fused.release(rank, table, self._released)
            return output
        if policy is None or not (policy.acts_on_decode or policy.observes_decode):
            return output
        over, slots = cursors.over[rank], cursors.slots[rank]
        if policy.observes_decode:
            view = store.views.slots(query, table, over, slots, params, shared)
            dense.put_state(policy.observe_step(view))
        if policy.acts_on_decode:
            view = store.views.slots(query, table, over, slots, params, shared)
            release = policy.release(view)
            if release.rewrite_slots is not None and release.rewrite_keys is not None:
                dense.rewrite_keys(release.rewrite_slots, release.rewrite_keys)
            store.views.rewrite(release.row_state)
            dense.empty_slots(release.slot, over)
            self._released.copy_(release.slot)
        return output

    def advance(self) -> None:
        """Count the step on the host, by the arithmetic the device follows."""
        self.store.columns += 1
        self.store.ledger.advance()
        self.store.dense.advance(self.store.ledger.slots if self._cursors.bounded else None)

    def thaw(self) -> None:
        """Hand the cursor over to the storage, which then goes on by itself."""
        self.store.dense.released = self._released


class FrozenCache:
    """Hold all layers of a cache in slots of fixed number, until it is thawed or has to grow.

    Args:
        room: tokens every row can take before the layers grow.
    """

    def __init__(self, stores: Sequence[LayerStore], room: int) -> None:
        for store in stores:
            store.ledger.reserve(room)
        self._cursors: Cursors | FormCursors
        self._layers: Sequence[FrozenLayer | FrozenForm]
        self._cursors, self._layers = _frozen_forms(stores) or _frozen_slots(stores)
        counts = [store.ledger.room for store in stores]
        self.room = min((count for count in counts if count is not None), default=None)
        """Steps until a layer is full; None where none can be."""

    def begin(self) -> None:
        """Start a step on the device."""
        self._cursors.begin()

    def attend(
        self,
        rank: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        shared: dict[str, Any],
    ) -> Tensor:
        """Run one layer's part of the step: [B, H, 1, D] → [B, 1, H, D]."""
        return self._layers[rank].step(query, key, value, params, shared)

    def end(self) -> None:
        """Finish a step on the device."""
        self._cursors.end()

    def advance(self) -> None:
        """Count the step on the host; while a graph runs, the host has the time."""
        for layer in self._layers:
            layer.advance()
        if self.room is not None:
            self.room -= 1

    def thaw(self) -> None:
        """Give the layers back to decode that the host leads."""
        for layer in self._layers:
            layer.thaw()


def has_kernel(store: LayerStore, form: Form | None = None) -> bool:
    """Say whether a step attends without a mask in this layer, in a form or in its own."""
    key, value = store.dense.table[KEY], store.dense.table[VALUE]
    if not key.is_cuda:
        return False
    group = store.plan.config.num_attention_heads // key.shape[1]
    form = _form(store) if form is None else form
    return tried(key.device, key.dtype, group, key.shape[-1], value.shape[-1], form) is not None


def _form(store: LayerStore) -> Form:
    """Return the form in which a step calls the attention kernel."""
    policy = store.plan.cache_policy
    if policy is None or not store.ledger.bounded:
        return Form(holes=False)
    rule = policy.release_rule(torch.ones(1, dtype=torch.int64))
    return Form(tells=rule is not None and rule.worth != "age")


def _frozen_slots(stores: Sequence[LayerStore]) -> tuple[Cursors, Sequence[FrozenLayer]]:
    for store in stores:
        store.dense.reserve(store.ledger.capacity)
    cursors = Cursors(stores)
    layers = [FrozenLayer(store, rank, cursors) for rank, store in enumerate(stores)]
    for store in stores:  # kernels are tried now, because trying them waits for the device
        has_kernel(store)
    first = stores[0].dense.table[KEY]
    if first.is_cuda:
        append_kernel(first.device, first.dtype)
    if all(has_kernel(store) for store in stores):
        cursors.fused = fused_release(stores, cursors)
    if cursors.fused is None and cursors.bounded:
        for store in stores:
            has_kernel(store, BOUNDED)
    return cursors, layers


def _frozen_forms(
    stores: Sequence[LayerStore],
) -> tuple[FormCursors, Sequence[FrozenForm]] | None:
    """Freeze layers whose storage is a method's own; all layers of a cache are, or none is."""
    forms = [store for store in stores if isinstance(store, FormattedStore)]
    if not forms:
        return None
    cursors = FormCursors(forms)
    return cursors, [FrozenForm(store, rank, cursors) for rank, store in enumerate(forms)]
