"""One layer's part of the flow: attend on untouched states, then decide, then move memory.

Shapes: B rows, H query heads, K key/value heads, Q new columns, N entries, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.dense import KEY, POSITION, VALUE, DenseStorage
from kvdock.layout import BatchLayout
from kvdock.ledger import Ledger
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, DecodeView, PrefillView, Selection
from kvdock.storage import RowGroup

Choices = list[tuple[RowGroup, Selection | None]]


class LayerStore:
    """Run prefill and decode of one managed layer over its storage.

    Args:
        rank: the layer's place among the managed layers.
    """

    def __init__(self, plan: DockPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.storage = DenseStorage()
        self.ledger = Ledger(plan.cache_policy)
        self.row_state: dict[str, Tensor] = {}
        self.open = False
        """Whether a prompt is coming in and has not been compressed yet."""
        self._tails: list[Tensor | None] = []
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
        turn: int,
        last: bool,
        prompt_columns: int,
    ) -> Tensor:
        """Attend with a forward of a prompt, then keep what the policy keeps if it is the last.

        Returns:
            [B, Q, H, D]; pad columns are zero.
        """
        layout.check_past(self.ledger.tokens or [0] * layout.batch)
        if not self.open:
            self.ledger.begin_turn(layout.batch)
            self.open, self._tails = True, [None] * layout.batch
        self._params = params
        starts = self.ledger.bring(layout.new_tokens)
        if self.storage.empty and last:
            return self._one_shot(query, key, value, layout, params, turn)
        if self.storage.empty:
            self.storage.start(key, value, prompt_columns)
        self.storage.extend(layout, key, value, starts)
        output = self._attend_stored(query, layout, params)
        self._remember_tail(query, layout)
        if last:
            self.finish(turn)
        return output

    def _one_shot(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: BatchLayout,
        params: AttentionParams,
        turn: int,
    ) -> Tensor:
        """Attend over the whole prompt and store only what is kept."""
        spans = layout.spans
        if spans is None:
            output = self.plan.prefill(query, key, value, params, self.rank)
            groups = [(tuple(range(layout.batch)), query, key, value)]
        else:
            rows = [(span.take(query), span.take(key), span.take(value)) for span in spans]
            output = _zeros(query, value)
            real = [row for row, span in zip(rows, spans, strict=True) if span.count]
            self.plan.prefill_ragged(real, layout, output, params, self.rank)
            groups = [((span.row,), *row) for span, row in zip(spans, rows, strict=True)]
        self._set_slots(key, value)
        kept: Choices = []
        for indices, q, k, v in groups:
            n = k.shape[2]
            position = torch.arange(n, device=k.device).expand(k.shape[0], k.shape[1], n)
            group = RowGroup(indices, k, v, position)
            kept.append((group, self._select(group, q, params, turn)))
        self._store(kept)
        self.open = False
        return output

    def _attend_stored(self, query: Tensor, layout: BatchLayout, params: AttentionParams) -> Tensor:
        """Attend over everything stored, this forward's tokens included."""
        spans = layout.spans
        if spans is None and len(set(self.storage.used)) == 1:
            key, value = self.storage.view(KEY), self.storage.view(VALUE)
            return self.plan.prefill(query, key, value, params, self.rank)
        output = _zeros(query, self.storage.view(VALUE))
        for span in layout.row_spans:
            if span.count:
                group = self.storage.row(span.row)
                one = span.take(query)
                states = self.plan.prefill(one, group.keys, group.values, params, self.rank)
                span.put(output, states)
        return output

    def _remember_tail(self, query: Tensor, layout: BatchLayout) -> None:
        """Keep the last W queries of every row across the chunks of one prompt."""
        window = self.plan.window
        if not window:
            return
        for span in layout.row_spans:
            one, tail = span.take(query)[:, :, -window:], self._tails[span.row]
            joined = one if tail is None else torch.cat([tail, one], dim=2)
            self._tails[span.row] = joined[:, :, -window:].clone()

    def finish(self, turn: int) -> None:
        """End the prompt: let the policy choose among everything stored."""
        if not self.open:
            return
        policy = self.plan.cache_policy
        again = policy is not None and policy.acts_on_later_turns
        # rows that decode holds at an allowance keep the one of their first prompt
        if turn == 0 or (again and not self.ledger.bounded):
            self._set_slots(self.storage.view(KEY), self.storage.view(VALUE))
        if turn == 0 or again:
            assert self._params is not None
            kept: Choices = []
            for row, tail in enumerate(self._tails):
                group = self.storage.row(row)
                kept.append((group, self._select(group, tail, self._params, turn)))
            self._store(kept)
        else:
            self.ledger.kept_turn()
        self.open, self._tails = False, []

    # -- decisions ---------------------------------------------------------------------------------

    def _set_slots(self, key: Tensor, value: Tensor) -> None:
        batch, heads = key.shape[:2]
        entry = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
        slot_bytes = entry * heads * batch * self.plan.facts.layers
        tokens = self.ledger.tokens
        slots = {n: self.plan.layer_slots(n, slot_bytes)[self.rank] for n in set(tokens)}
        self.ledger.slots = [slots[n] for n in tokens]

    def _select(
        self, group: RowGroup, queries: Tensor | None, params: AttentionParams, turn: int
    ) -> Selection | None:
        first = group.rows[0]  # rows of a group have the same length, so the same numbers
        slots = self.ledger.slots[first]
        policy = self.plan.cache_policy
        if policy is None or group.length <= slots:
            return None
        window = min(self.plan.window, self.ledger.turn_tokens[first])
        if queries is not None:
            queries = queries[:, :, queries.shape[2] - window :]
        rows = list(group.rows)
        view = PrefillView(
            layer=self.rank,
            layers=self.plan.facts.layers,
            slots=slots,
            queries=queries,
            keys=group.keys,
            values=group.values,
            positions=group.positions,
            params=params,
            turn=turn,
            rows=group.rows,
            slot_state=group.slot_state,
            row_state={name: state[rows] for name, state in self.row_state.items()},
        )
        return policy.select(view)

    def _store(self, kept: Choices) -> None:
        """Move what is kept into storage of its own size; the rest is freed with its tensors."""
        entries = {row: group.length for group, _ in kept for row in group.rows}
        self._keep_row_state(kept)
        self.storage.fill([_gather(group, choice) for group, choice in kept])
        self.ledger.compressed([entries[row] for row in range(len(entries))])

    def _keep_row_state(self, kept: Choices) -> None:
        for group, choice in kept:
            for name, state in (choice.row_state if choice else {}).items():
                if name not in self.row_state:
                    shape = (len(self.ledger.tokens), *state.shape[1:])
                    self.row_state[name] = state.new_zeros(shape)
                self.row_state[name][list(group.rows)] = state

    # -- decode ------------------------------------------------------------------------------------

    def step(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Append one real token per row, attend, and let a policy that acts on decode release."""
        self.storage.append_step(key, value, self.ledger.tokens, self.ledger.limit)
        self.ledger.step()
        output = self.storage.attend_step(query, params)
        if self.ledger.limit is not None:
            self._release(query, params)
        return output

    def _release(self, query: Tensor, params: AttentionParams) -> None:
        slots = self.ledger.slots
        over = [live > limit for live, limit in zip(self.storage.live, slots, strict=True)]
        policy = self.plan.cache_policy
        if policy is None or not any(over):
            return
        view = DecodeView(
            layer=self.rank,
            layers=self.plan.facts.layers,
            queries=query,
            keys=self.storage.view(KEY),
            values=self.storage.view(VALUE),
            positions=self.storage.view(POSITION),
            over=torch.tensor(over, device=query.device),
            slots=torch.tensor(slots, device=query.device),
            params=params,
            slot_state=self.storage.slot_state(),
            row_state=self.row_state,
        )
        release = policy.release(view)
        if release.rewrite_slots is not None and release.rewrite_keys is not None:
            self.storage.rewrite_keys(release.rewrite_slots, release.rewrite_keys)
        self.row_state.update(release.row_state)
        self.storage.release(release.slot, over)

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
        for name, state in self.row_state.items():
            self.row_state[name] = state.index_select(0, index.to(state.device))

    def repeat_rows(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        rows = torch.arange(len(self.ledger.tokens)).repeat_interleave(repeats)
        self.select_rows(rows)


def _gather(group: RowGroup, choice: Selection | None) -> RowGroup:
    """Take the chosen entries, with the policy's replacements for keys or values."""
    if choice is None:
        return group

    def take(tensor: Tensor) -> Tensor:
        index = choice.index.view(*choice.index.shape, *[1] * (tensor.dim() - 3))
        return tensor.gather(2, index.expand(*choice.index.shape, *tensor.shape[3:]))

    return RowGroup(
        group.rows,
        take(group.keys) if choice.keys is None else choice.keys,
        take(group.values) if choice.values is None else choice.values,
        take(group.positions),
        dict(choice.slot_state),
    )


def _zeros(query: Tensor, value: Tensor) -> Tensor:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
