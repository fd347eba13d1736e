"""One layer's part of the flow: attend on untouched states, then decide, then move memory.

Shapes: B rows, H query heads, K key/value heads, Q new columns, N entries, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvdock.dense import KEY, VALUE, DenseStorage
from kvdock.gather import gather
from kvdock.layout import BatchLayout
from kvdock.ledger import Ledger
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, Selection
from kvdock.storage import KVStorage, RowGroup
from kvdock.storage_policy import StoreShape
from kvdock.views import LayerViews

Choices = list[tuple[RowGroup, Selection | None]]


class LayerStore:
    """Run prefill and decode of one managed layer over its storage.

    Args:
        rank: the layer's place among the managed layers.
    """

    def __init__(self, plan: DockPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.dense = DenseStorage()
        """Entries as the model made them: all that is kept, or a prompt until its end."""
        self.storage: KVStorage = self.dense
        """What holds the kept entries."""
        self.ledger = Ledger(plan.cache_policy)
        self.views = LayerViews(rank, plan.facts.layers)
        self.columns = 0
        """Columns seen, pads and evicted tokens included."""
        self.open = False
        """Whether a prompt is coming in and has not been compressed yet."""
        self._tails: list[Tensor | None] = []
        self._waiting: list[tuple[RowGroup, Tensor | None]] = []
        self._params: AttentionParams | None = None

    # -- prefill -----------------------------------------------------------------------------------

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
        """Attend with a forward of a prompt and hold its states until `finish` chooses.

        Args:
            room: columns of the whole prompt, reserved at once when it comes in pieces.

        Returns:
            [B, Q, H, D]; pad columns are zero.
        """
        layout.check_past(self.ledger.tokens or [0] * layout.batch)
        if not self.open:
            self.plan.facts.shard.check(key.shape[1])
            self.ledger.begin_turn(layout.batch)
            self.open, self._tails = True, [None] * layout.batch
        self._params = params
        starts = self.ledger.bring(layout.new_tokens)
        if self.storage.empty and self.dense.empty and self.columns >= room:
            return self._whole(query, key, value, layout, params)
        if self.dense.empty:
            self.dense.start(key, value, room)
        self.dense.extend(layout, key, value, starts)
        output, lse = self._attend_stored(query, layout, params)
        self._observe_stored(query, layout, params, lse)
        self._remember_tail(query, layout)
        return output

    def _whole(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: BatchLayout,
        params: AttentionParams,
    ) -> Tensor:
        """Attend over a prompt that came in one forward, without storing what will be dropped."""
        policy = self.plan.cache_policy
        spans, lse = layout.row_spans, None
        groups: list[tuple[tuple[int, ...], Tensor, Tensor, Tensor]]
        groups = [((s.row,), s.take(query), s.take(key), s.take(value)) for s in spans]
        if layout.spans is None:
            output, lse = self.plan.prefill(query, key, value, params, self.rank)
            if policy is None or not policy.revises:  # all rows hold the same number of entries
                groups = [(tuple(range(layout.batch)), query, key, value)]
        else:
            output = _zeros(query, value)
            real = [group[1:] for group, span in zip(groups, spans, strict=True) if span.count]
            self.plan.prefill_ragged(real, layout, output, params, self.rank)
        for indices, q, k, v in groups:
            n = k.shape[2]
            position = torch.arange(n, device=k.device).expand(k.shape[0], k.shape[1], n)
            group = RowGroup(indices, k, v, position)
            if policy is not None and policy.observes_prompt:
                part = None if lse is None else lse[indices[0] : indices[-1] + 1]
                view = self.views.prompt(group, q, self.ledger, params, lse=part)
                group = replace(group, slot_state=policy.observe_prompt(view))
            self._waiting.append((group, q))
        return output

    def _attend_stored(
        self, query: Tensor, layout: BatchLayout, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over everything stored, this forward's tokens included."""
        spans = layout.spans
        if spans is None and len(set(self.dense.used)) == 1:
            key, value = self.dense.view(KEY), self.dense.view(VALUE)
            return self.plan.prefill(query, key, value, params, self.rank)
        output = _zeros(query, self.dense.view(VALUE))
        for span in layout.row_spans:
            if span.count:
                group = self.dense.row(span.row)
                one = span.take(query)
                states, _ = self.plan.prefill(one, group.keys, group.values, params, self.rank)
                span.put(output, states)
        return output, None

    def _remember_tail(self, query: Tensor, layout: BatchLayout) -> None:
        """Keep the last W queries of every row across the chunks of one prompt."""
        window = self.plan.window
        if not window:
            return
        for span in layout.row_spans:
            one, tail = span.take(query)[:, :, -window:], self._tails[span.row]
            joined = one if tail is None else torch.cat([tail, one], dim=2)
            self._tails[span.row] = joined[:, :, -window:].clone()

    def _observe_stored(
        self, query: Tensor, layout: BatchLayout, params: AttentionParams, lse: Tensor | None
    ) -> None:
        policy = self.plan.cache_policy
        if policy is None or not policy.observes_prompt:
            return
        for span in layout.row_spans:
            if span.count:
                row = self.dense.row(span.row)
                one = None if lse is None else lse[span.row : span.row + 1]
                view = self.views.prompt(row, span.take(query), self.ledger, params, lse=one)
                self.dense.put_state(policy.observe_prompt(view), span.row)

    def finish(self, turn: int, shared: dict[str, Any]) -> None:
        """End the prompt: let the policy choose among everything the prompt left here."""
        policy = self.plan.cache_policy
        # rows held at an allowance during decode have to be brought back to it after a turn
        again = policy is not None and (policy.acts_on_later_turns or policy.acts_on_decode)
        if turn == 0 or (again and not self.ledger.bounded):
            # rows that decode holds at an allowance keep the one of their first prompt
            self._set_slots()
        if turn == 0 or again:
            if not self._waiting:
                tails = enumerate(self._tails)
                self._waiting = [(self.dense.row(row), tail) for row, tail in tails]
            chosen = [(group, self._select(group, q, turn, shared)) for group, q in self._waiting]
            self._waiting = []
            self._store(chosen)
        else:
            self.ledger.kept_turn()
        self.open, self._tails = False, []

    # -- decisions ---------------------------------------------------------------------------------

    def _set_slots(self) -> None:
        if self._waiting:
            key, value = self._waiting[0][0].keys, self._waiting[0][0].values
        else:
            key, value = self.dense.view(KEY), self.dense.view(VALUE)
        tokens = self.ledger.tokens
        entry = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
        heads = key.shape[1] * self.plan.facts.shard.size
        slot_bytes = entry * heads * len(tokens) * self.plan.facts.layers
        slots = {n: self.plan.layer_slots(n, slot_bytes)[self.rank] for n in set(tokens)}
        self.ledger.slots = [slots[n] for n in tokens]

    def _select(
        self, group: RowGroup, queries: Tensor | None, turn: int, shared: dict[str, Any]
    ) -> Selection | None:
        first = group.rows[0]  # rows of a group have the same length, so the same numbers
        policy = self.plan.cache_policy
        if policy is None or group.length <= self.ledger.slots[first]:
            return None
        assert self._params is not None
        queries = self._last(queries, policy.query_window, first)
        return policy.select(
            self.views.prompt(group, queries, self.ledger, self._params, turn=turn, shared=shared)
        )

    def _last(self, queries: Tensor | None, window: int, row: int) -> Tensor | None:
        """Return a row's last ``window`` queries of this turn, fewer where it brought fewer."""
        if queries is None:
            return None
        count = min(window, self.ledger.turn_tokens[row])
        return queries[:, :, queries.shape[2] - count :]

    def _store(self, kept: Choices) -> None:
        """Move what is kept into storage of its own size; the rest is freed with its tensors."""
        entries = {row: group.length for group, _ in kept for row in group.rows}
        policy = self.plan.cache_policy
        for group, choice in kept:
            if choice is not None and policy is not None and policy.revises:
                for row in group.rows:
                    self.ledger.slots[row] = choice.index.shape[2]
        for group, choice in kept:
            if choice is not None:
                self.views.keep(group.rows, choice.row_state, len(entries))
        self.dense.fill([gather(group, choice) for group, choice in kept])
        self.ledger.compressed([entries[row] for row in range(len(entries))])

    def shrink(self, choices: dict[int, Selection]) -> None:
        """Keep less of some rows, as a later layer of the same prompt made the policy decide."""
        rows = range(len(self.ledger.tokens))
        entries = list(self.ledger.entries)
        self._store([(self.dense.row(row), choices.get(row)) for row in rows])
        self.ledger.compressed(entries)

    # -- decode ------------------------------------------------------------------------------------

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        shared: dict[str, Any],
    ) -> Tensor:
        """Append one real token per row, attend, and let a policy that acts on decode release."""
        positions = self.ledger.tokens
        self.ledger.step()
        self.storage.append_step(key, value, positions, self.ledger.capacity)
        output = self.storage.attend_step(query, params)
        policy = self.plan.cache_policy
        over = self._over
        if policy is not None and policy.observes_decode:
            view = self.views.step(query, self.dense, self.ledger, over, params, shared)
            self.dense.put_state(policy.observe_step(view))
        if policy is not None and policy.acts_on_decode and any(over):
            view = self.views.step(query, self.dense, self.ledger, over, params, shared)
            release = policy.release(view)
            if release.rewrite_slots is not None and release.rewrite_keys is not None:
                self.dense.rewrite_keys(release.rewrite_slots, release.rewrite_keys)
            self.views.row_state.update(release.row_state)
            self.dense.release(release.slot, over)
        return output

    @property
    def shape(self) -> StoreShape:
        """Describe what is stored."""
        key, value = self.dense.table[KEY], self.dense.table[VALUE]
        return StoreShape.of(key, value, batch=key.shape[0])

    @property
    def expected_nbytes(self) -> int:
        """Return the bytes of keys and values by formula."""
        return self.shape.dense_entry * self.ledger.capacity

    @property
    def _over(self) -> list[bool]:
        """Say which rows hold more than their allowance."""
        pairs = zip(self.storage.live, self.ledger.slots, strict=True)
        return [live > slots for live, slots in pairs]

    # -- rows --------------------------------------------------------------------------------------

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows of everything the layer holds."""
        if self.storage.empty:
            return
        # Even rows (the usual beam search) spare the copy of the order to the host.
        even = self.ledger.even and self.storage.even
        order = [0] * index.numel() if even else index.tolist()
        self.ledger.select_rows(order)
        self.storage.select_rows(index, order)
        self.views.select_rows(index)

    def repeat_rows(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        rows = torch.arange(len(self.ledger.tokens)).repeat_interleave(repeats)
        self.select_rows(rows)


def _zeros(query: Tensor, value: Tensor) -> Tensor:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
