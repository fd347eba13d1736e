"""StreamingLLM's eviction (section 3 of the paper) with positions inside the cache.

Shapes: B or b rows, K key/value heads, N entries or slots, S sinks, C kept entries, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.budget import Budget
from kvdock.errors import BudgetError, UnsupportedError
from kvdock.policy import CachePolicy, DecodeView, ModelFacts, PrefillView, Release, Selection
from kvdock.release import Following, ReleaseRule
from kvdock_streamingllm.options import StreamingLLMOptions

SINKS, EVICTED, DELTA = "sink_keys", "evicted", "delta"


class StreamingLLMPolicy(CachePolicy):
    """Keep positions [0, S) and the last C − S, at the prompt's end and after every step.

    The paper numbers positions inside the cache. RoPE sees relative distances only, so the recent
    keys and the query stay where they are and the S sinks move towards them by the number e of
    evicted tokens: a sink j stands at position j + e. Original sink keys are kept, so no error
    builds up.
    """

    acts_on_decode = True
    acts_on_later_turns = True

    def __init__(self, options: StreamingLLMOptions) -> None:
        self.options = options
        self._facts: ModelFacts | None = None

    @property
    def moves_sinks(self) -> bool:
        """Say whether sinks follow the window."""
        return self.options.positions == "cache" and self.options.sinks > 0

    def bind(self, facts: ModelFacts) -> None:
        """Take the model's rotary functions, which positions inside the cache need."""
        # Without sinks nothing moves, but leaving keys where they are is the paper's numbering only
        # where RoPE sees nothing but relative distances.
        if self.options.positions == "cache" and facts.rotate is None:
            raise UnsupportedError(
                f"streamingllm: positions='cache' renumbers by RoPE, but {facts.rotate_reason}."
                " Use positions='original'."
            )
        self._facts = facts

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget of slots that the sinks alone would fill."""
        if budget.kind == "tokens" and budget.amount <= self.options.sinks:
            raise BudgetError(
                f"streamingllm: budget {budget} leaves nothing beside {self.options.sinks} sinks."
                " Raise the budget or lower sinks."
            )

    def select(self, view: PrefillView) -> Selection:
        """Keep the sinks and the most recent entries; drop what lies between."""
        b, kv_heads, n, head_dim = view.keys.shape
        sinks = min(self.options.sinks, view.slots - 1)
        device = view.keys.device
        first = torch.arange(sinks, device=device)
        recent = torch.arange(n - (view.slots - sinks), n, device=device)
        index = torch.cat([first, recent]).expand(b, kv_heads, view.slots)
        if not self.moves_sinks:
            return Selection(index)
        raw = view.keys.new_zeros(b, kv_heads, self.options.sinks, head_dim)
        raw[:, :, :sinks] = self._raw(view.keys[:, :, :sinks], view.row_state, first < sinks)
        evicted = view.positions[:, 0, -1] + 1 - view.slots
        keys = view.keys.gather(2, index[..., None].expand(-1, -1, -1, head_dim))
        delta = evicted[:, None].expand(b, sinks)
        keys[:, :, :sinks] = self._turn(raw[:, :, :sinks], delta, view.layer)
        return Selection(index, keys=keys, row_state={SINKS: raw, EVICTED: evicted})

    def release(self, view: DecodeView) -> Release:
        """Give up the oldest entry behind the sinks and move the sinks on by one.

        Sinks never leave the first slots, and every head and layer holds the same positions.
        """
        kv_heads = view.keys.shape[1]
        position = view.positions[:, 0]
        sinks = (view.slots - 1).clamp(max=self.options.sinks)[:, None]
        last = torch.iinfo(position.dtype).max
        oldest = position.masked_fill(position < sinks, last).argmin(dim=1)
        slot = oldest[:, None].expand(-1, kv_heads)
        if not self.moves_sinks:
            return Release(slot)
        # A share of a short prompt may be fewer slots than sinks; the state keeps its full width.
        count = min(self.options.sinks, view.keys.shape[2])
        slots = torch.arange(count, device=position.device)
        # Every layer has a count of its own, on its own device.
        evicted = view.row_state.get(EVICTED, torch.zeros_like(view.slots)) + view.over
        if view.layer == 0:  # one tensor for all layers, so that its angles are computed once
            view.shared[DELTA] = evicted[:, None] * (slots < sinks)
        delta = view.shared[DELTA].to(position.device)
        raw = self._raw(view.keys[:, :, :count], view.row_state, slots < sinks)
        keys = self._turn(raw, delta, view.layer)
        missing = self.options.sinks - count
        state = {SINKS: F.pad(raw, (0, 0, 0, missing)) if missing else raw}
        where = slots.expand(len(oldest), kv_heads, count)
        return Release(slot, where, keys, state | {EVICTED: evicted})

    def release_rule(self, slots: Tensor) -> ReleaseRule:
        """Describe `release`."""
        following = Following(SINKS, EVICTED, self.options.sinks) if self.moves_sinks else None
        stays = (slots - 1).clamp(max=self.options.sinks)
        return ReleaseRule("age", stays, following=following)

    def _raw(self, held: Tensor, row_state: dict[str, Tensor], is_sink: Tensor) -> Tensor:
        """Return the sinks' keys as the model made them; before an eviction they are ``held``."""
        if SINKS not in row_state:
            return held.clone()
        moved = (row_state[EVICTED] > 0)[:, None] & is_sink
        stored = row_state[SINKS][:, :, : held.shape[2]]
        return torch.where(moved[:, None, :, None], stored, held)

    def _turn(self, raw: Tensor, delta: Tensor, layer: int) -> Tensor:
        assert self._facts is not None and self._facts.rotate is not None
        return self._facts.rotate(raw, delta, layer)
