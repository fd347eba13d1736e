"""One layer's part of the flow: attend on untouched states, then decide, then move memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.layout import BatchLayout
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, DecodeView, PrefillView, Selection
from kvdock.storage import DenseStorage, RowGroup, grown_capacity


class LayerStore:
    """Run prefill and decode of one managed layer over its storage.

    Args:
        rank: the layer's place among the managed layers.
    """

    def __init__(self, plan: DockPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.storage = DenseStorage()
        self.tokens: list[int] = []
        self.slots: list[int] = []
        self.row_state: dict[str, Tensor] = {}
        self.turn_tokens: list[int] = []
        self._tails: list[Tensor | None] = []
        self.open = False
        self._params: AttentionParams | None = None
        self.entries: list[int] = []
        self.appended: list[int] = []
        self.predicted_capacity = 0

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
        if not self.tokens:
            self.tokens = [0] * layout.batch
        layout.check_past(self.tokens)
        if not self.open:
            self.open, self.turn_tokens = True, [0] * layout.batch
            self._tails = [None] * layout.batch
        self._params = params
        starts = list(self.tokens)
        new = layout.new_tokens
        self.tokens = [had + more for had, more in zip(starts, new, strict=True)]
        self.turn_tokens = [had + more for had, more in zip(self.turn_tokens, new, strict=True)]
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
        kept: list[tuple[RowGroup, Selection | None]] = []
        for rows_, q, k, v in groups:
            n = k.shape[2]
            position = torch.arange(n, device=k.device).expand(k.shape[0], k.shape[1], n)
            group = RowGroup(rows_, k, v, position)
            kept.append((group, self._select(group, q, params, turn)))
        self._store(kept)
        return output

    def _attend_stored(self, query: Tensor, layout: BatchLayout, params: AttentionParams) -> Tensor:
        """Attend over everything stored, this forward's tokens included."""
        spans = layout.spans
        used = self.storage.used
        if spans is None and len(set(used)) == 1:
            key, value = self.storage.view("key"), self.storage.view("value")
            return self.plan.prefill(query, key, value, params, self.rank)
        output = _zeros(query, self.storage.view("value"))
        for row in range(layout.batch):
            if spans is not None and spans[row].count == 0:
                continue
            group = self.storage.row(row)
            one = spans[row].take(query) if spans is not None else query[row : row + 1]
            states = self.plan.prefill(one, group.keys, group.values, params, self.rank)
            if spans is not None:
                spans[row].put(output, states)
            else:
                output[row] = states[0]
        return output

    def _remember_tail(self, query: Tensor, layout: BatchLayout) -> None:
        """Keep the last W queries of every row across the chunks of one prompt."""
        window = self.plan.window
        if not window:
            return
        for row in range(layout.batch):
            one = layout.spans[row].take(query) if layout.spans else query[row : row + 1]
            tail = self._tails[row]
            joined = one if tail is None else torch.cat([tail, one[:, :, -window:]], dim=2)
            self._tails[row] = joined[:, :, -window:].clone()

    def finish(self, turn: int) -> None:
        """End the prompt: let the policy choose among everything stored."""
        if not self.open:
            return
        policy = self.plan.cache_policy
        if turn == 0:
            self._set_slots(self.storage.view("key"), self.storage.view("value"))
        if turn == 0 or (policy is not None and policy.acts_on_later_turns):
            assert self._params is not None
            kept: list[tuple[RowGroup, Selection | None]] = []
            for row in range(len(self.tokens)):
                group = self.storage.row(row)
                kept.append((group, self._select(group, self._tails[row], self._params, turn)))
            self._store(kept)
        else:
            self._expect_growth()
        self.open, self._tails = False, []

    # -- decisions ---------------------------------------------------------------------------------

    def _set_slots(self, key: Tensor, value: Tensor) -> None:
        batch, heads = key.shape[:2]
        entry = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
        slot_bytes = entry * heads * batch * len(self.plan.managed)
        slots = {n: self.plan.layer_slots(n, slot_bytes)[self.rank] for n in set(self.tokens)}
        self.slots = [slots[n] for n in self.tokens]

    def _select(
        self, group: RowGroup, queries: Tensor | None, params: AttentionParams, turn: int
    ) -> Selection | None:
        slots = self.slots[group.rows[0]]
        policy = self.plan.cache_policy
        if policy is None or group.length <= slots:
            return None
        window = min(self.plan.window, self.turn_tokens[group.rows[0]])
        tail = (
            queries[:, :, queries.shape[2] - window :] if queries is not None and window else None
        )
        rows = list(group.rows)
        view = PrefillView(
            layer=self.rank,
            layers=len(self.plan.managed),
            slots=slots,
            queries=tail,
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

    def _store(self, kept: list[tuple[RowGroup, Selection | None]]) -> None:
        """Move what is kept into storage of its own size; the rest is freed with its tensors."""
        groups = [group if choice is None else _gather(group, choice) for group, choice in kept]
        names = {name for group in groups for name in group.slot_state}
        for group in groups:
            for name in names - group.slot_state.keys():
                shape = next(g.slot_state[name] for g in groups if name in g.slot_state)
                group.slot_state[name] = shape.new_zeros(*group.keys.shape[:3], *shape.shape[3:])
        self._keep_row_state(kept)
        self.entries = [0] * len(self.tokens)
        self.appended = [0] * len(self.tokens)
        for before, _ in kept:
            for row in before.rows:
                self.entries[row] = before.length
        self.storage.fill(groups)
        self.predicted_capacity = max(self.predicted_live)

    def _keep_row_state(self, kept: list[tuple[RowGroup, Selection | None]]) -> None:
        for group, choice in kept:
            for name, state in (choice.row_state if choice else {}).items():
                if name not in self.row_state:
                    self.row_state[name] = state.new_zeros(len(self.tokens), *state.shape[1:])
                self.row_state[name][list(group.rows)] = state

    @property
    def predicted_live(self) -> list[int]:
        """Return the entries each row must hold by the policy's own formula."""
        policy = self.plan.cache_policy
        facts = zip(self.entries, self.slots, self.appended, strict=True)
        if policy is None:
            return [entries + more for entries, _, more in facts]
        return [policy.predicted_slots(entries, slots, more) for entries, slots, more in facts]

    def _expect_growth(self) -> None:
        """Note what an untouched later turn adds to the prediction."""
        pairs = zip(self.appended, self.turn_tokens, strict=True)
        self.appended = [had + more for had, more in pairs]
        self.predicted_capacity = max(self.predicted_capacity, *self.predicted_live)

    # -- decode ------------------------------------------------------------------------------------

    def step(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Append one real token per row, attend, and let a policy that acts on decode release."""
        policy = self.plan.cache_policy
        bounded = policy is not None and policy.acts_on_decode
        limit = max(self.slots) + 1 if bounded else None
        self.storage.append_step(key, value, self.tokens, limit)
        self.tokens = [n + 1 for n in self.tokens]
        need = max(self.predicted_live) + 1
        self.predicted_capacity = grown_capacity(self.predicted_capacity, need, limit)
        self.appended = [n + 1 for n in self.appended]
        output = self.storage.attend_step(query, params)
        if bounded:
            self._release(query, params)
        return output

    def _release(self, query: Tensor, params: AttentionParams) -> None:
        over = [n > s for n, s in zip(self.storage.live, self.slots, strict=True)]
        if not any(over):
            return
        policy = self.plan.cache_policy
        assert policy is not None
        device = query.device
        view = DecodeView(
            layer=self.rank,
            layers=len(self.plan.managed),
            queries=query,
            keys=self.storage.view("key"),
            values=self.storage.view("value"),
            positions=self.storage.view("position"),
            over=torch.tensor(over, device=device),
            slots=torch.tensor(self.slots, device=device),
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
        facts = [self.tokens, self.slots, self.turn_tokens, self.entries, self.appended]
        even = all(len(set(fact)) <= 1 for fact in facts)
        order = [0] * index.numel() if even else index.tolist()
        picked = [[fact[row] for row in order] if fact else fact for fact in facts]
        self.tokens, self.slots, self.turn_tokens, self.entries, self.appended = picked
        self.storage.select_rows(index)
        for name, state in self.row_state.items():
            self.row_state[name] = state.index_select(0, index.to(state.device))

    def repeat_rows(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        if not self.storage.empty:
            self.select_rows(torch.arange(len(self.tokens)).repeat_interleave(repeats))


def _gather(group: RowGroup, choice: Selection) -> RowGroup:
    """Take the chosen entries, with the policy's replacements for keys or values."""

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
