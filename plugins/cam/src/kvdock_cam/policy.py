"""CaM's merging (section 4 of the paper) at the end of the prompt, on key/value heads.

Shapes: b rows, k a key/value head, i an evicted and j a kept entry; C kept entries, N entries.
"""

import torch
from torch import Tensor

from kvdock.budget import Budget
from kvdock.errors import BudgetError, UnsupportedError
from kvdock.kernels.selection import top_positions
from kvdock.kernels.window_scores import window_votes
from kvdock.policy import CachePolicy, ModelFacts, PrefillView, Selection
from kvdock.shard import WHOLE
from kvdock_cam.draws import uniform
from kvdock_cam.merging import gaps, merge_probability, merged_values
from kvdock_cam.options import CaMOptions


class CaMPolicy(CachePolicy):
    """Evict as the base says, then give evicted values to the m kept entries that follow.

    votes   Ā[k, j] = mean over the group of Σ_{r in window} softmax(q_r·K/√D)[j]
    chance  p_i = clamp(Ā_i / mean of Ā over the targets of i, 0, 1)
    merge   V_j += Σ_{i: j is a target of i} M_i·V_i / m', M_i ~ Bernoulli(p_i) or p_i itself

    Keys stay as they are.
    """

    def __init__(self, options: CaMOptions) -> None:
        self.options = options
        self.query_window = options.window
        self.acts_on_later_turns = options.recompress
        self._shard = WHOLE

    def bind(self, facts: ModelFacts) -> None:
        """Remember which of the model's heads are here: every head has its own draws."""
        self._shard = facts.shard

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget of slots that the window alone would fill."""
        if budget.kind == "tokens" and budget.amount <= self.options.window:
            raise BudgetError(
                f"cam: budget {budget} leaves nothing beside window={self.options.window}."
                " Raise the budget or lower window."
            )

    def select(self, view: PrefillView) -> Selection:
        """Return the C kept entries of every key/value head with their merged values."""
        if view.queries is None or view.queries.shape[2] == 0:
            raise UnsupportedError(
                f"row {view.rows[0]} brings no token in turn {view.turn}, so no query can vote on"
                " what it keeps. Give every row a token in every turn, or use recompress=False."
            )
        window = max(1, min(view.queries.shape[2], view.slots - 1))
        queries = view.queries[:, :, view.queries.shape[2] - window :]
        attention = window_votes(queries, view.keys, view.params)
        index = self._kept(attention, view.slots, window)
        gap = gaps(index, view.length)
        weights = merge_probability(attention, index, gap, self.options.merge)
        if self.options.sample:
            draws = uniform(
                view.positions,
                self.options.seed,
                view.layer,
                self._shard.place(view.keys.shape[1]).start,
            )
            weights = (draws < weights).float()
        return Selection(
            index, values=merged_values(view.values, weights, index, gap, self.options.merge)
        )

    def _kept(self, attention: Tensor, slots: int, window: int) -> Tensor:
        """Return the entries that plain eviction keeps, ascending, [b, K, C]."""
        length, device = attention.shape[2], attention.device
        if self.options.base == "streaming":
            chosen = torch.arange(slots // 2, device=device).expand(*attention.shape[:2], -1)
        else:
            chosen = top_positions(attention[..., : length - window], slots - window)
        recent = torch.arange(length - slots + chosen.shape[2], length, device=device)
        return torch.cat([chosen, recent.expand(*chosen.shape[:2], -1)], dim=2)
