"""CakeKV's allocation and eviction (sections 4.2 and 4.3 of the paper), on key/value heads.

Shapes: B rows, K key/value heads, N entries or slots, C slots per layer on average, W window.
"""

from typing import Any

import torch
from torch import Tensor

from kvdock.budget import Budget
from kvdock.errors import BudgetError
from kvdock.kernels.selection import top_positions
from kvdock.kernels.window_scores import pooled, window_probabilities
from kvdock.policy import (
    CachePolicy,
    DecodeView,
    ModelFacts,
    PrefillView,
    Release,
    RevisionView,
    Selection,
)
from kvdock.release import ReleaseRule
from kvdock.shard import WHOLE
from kvdock_cakekv.cascade import Cascade
from kvdock_cakekv.options import CakeKVOptions
from kvdock_cakekv.scores import preference, window_statistics
from kvdock_cakekv.temperatures import fitted

CASCADES = "cakekv cascades"
SLACK_BYTES = 128 * 2**20
"""Entries of earlier layers that may wait to be freed; freeing them one layer at a time is slow."""


class CakeKVPolicy(CachePolicy):
    """Share L·(C − W) prefix entries between layers by preference; rank entries by indicator.

    preference  p_l = H_l^(1/τ1) · V_l^(1/τ2), the dispersion and shift of the window's attention
    budget      clamp(λ·p_l, 1, n − W) prefix entries with Σ = L·(C − W), and the window
    indicator   e[k, j] = avg-pool(mean_g (mean_r A + γ·var_r A)), ties to the lower position
    decode      the entry before the window that the step's own query attends to least goes

    Budgets hold for the whole conversation.
    """

    acts_on_decode = True
    acts_on_later_turns = True
    revises = True

    def __init__(self, options: CakeKVOptions) -> None:
        self.options = options
        self.query_window = options.window
        self._config: Any = None
        self._shard = WHOLE

    def bind(self, facts: ModelFacts) -> None:
        """Remember which model it is, for its temperatures, and which of its heads are here."""
        self._config, self._shard = facts.config, facts.shard

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget of slots that the window alone would fill."""
        if budget.kind == "tokens" and budget.amount <= self.options.window:
            raise BudgetError(
                f"cakekv: budget {budget} leaves nothing beside window={self.options.window}."
                " Raise the budget or lower window."
            )

    def temperatures(self, slots: int) -> tuple[float, float]:
        """Return τ1 and τ2 for C = ``slots``: the options', else the model's."""
        tau1, tau2 = fitted(self._config, slots)
        mine = self.options
        return (
            tau1 if mine.tau1 is None else mine.tau1,
            tau2 if mine.tau2 is None else mine.tau2,
        )

    def select(self, view: PrefillView) -> Selection:
        """Keep what the layers so far leave to this one; a later turn keeps the first's budget."""
        assert view.queries is not None
        window = max(1, min(view.queries.shape[2], view.slots - 1))
        queries = view.queries[:, :, view.queries.shape[2] - window :]
        indicator, statistics = window_statistics(
            queries, view.keys, view.params, self.options.gamma
        )
        indicator = pooled(indicator, self.options.kernel, "avg")
        if view.turn:
            chosen = top_positions(indicator, view.slots - window)
            return Selection(_with_window(chosen, view.length, window))
        cascade = self._cascade(view, window)
        statistics = self._shard.total(statistics)
        cascade.preferences.append(preference(statistics, *self.temperatures(view.slots)))
        chosen = top_positions(indicator, cascade.targets()[-1])
        cascade.indicators.append(indicator.gather(2, chosen))
        return Selection(_with_window(chosen, view.length, window))

    def revise(self, view: RevisionView) -> dict[int, Selection]:
        """Shrink earlier layers when it frees enough, and all to their budgets after the last."""
        cascade = view.shared.get(CASCADES, {}).get(view.row)
        if cascade is None:
            return {}
        targets = cascade.targets()
        pairs = zip(view.lengths, targets, strict=True)
        excess = [length - cascade.window - target for length, target in pairs]
        if view.layer + 1 == view.layers:
            del view.shared[CASCADES][view.row]
        elif sum(excess) * cascade.entry_bytes < max(SLACK_BYTES, cascade.total_bytes // 4):
            return {}
        shrunk = {}
        for layer, (target, more) in enumerate(zip(targets, excess, strict=True)):
            if more:
                indicator = cascade.indicators[layer]
                chosen = top_positions(indicator, target)
                cascade.indicators[layer] = indicator.gather(2, chosen)
                shrunk[layer] = Selection(_with_window(chosen, view.lengths[layer], cascade.window))
        return shrunk

    def release(self, view: DecodeView) -> Release:
        """Give up the entry before the window that the step's query attends to least."""
        position, width = view.positions, view.positions.shape[2]
        alone = position.shape[0] == 1  # then no slot is empty and nothing needs a mask
        valid = None if alone else position >= 0
        blocks = window_probabilities(view.queries, view.keys, view.params, valid)
        score = torch.cat([block[:, :, :, 0].mean(dim=2) for _, block in blocks], dim=1)
        # Slots are not in the order of positions; the window is last in it, but for empty slots.
        if valid is not None:
            position = position.masked_fill(~valid, torch.iinfo(position.dtype).max)
        order = position.argsort(dim=2)
        ranked = score.gather(2, order)
        if valid is None:
            old = width - max(1, min(self.options.window, width - 2))
            ranked = self._pooled(ranked[..., :old])
        else:
            window = (view.slots - 1).clamp(min=1, max=self.options.window)[:, None, None]
            count = valid.sum(dim=2, keepdim=True) - window
            beyond = torch.arange(width, device=position.device) >= count
            ranked = self._pooled(ranked.masked_fill(beyond, 0)).masked_fill(beyond, torch.inf)
        # Of equal scores the lower position stays, as in the prompt.
        last = ranked.shape[2] - 1 - ranked.flip(2).argmin(dim=2, keepdim=True)
        return Release(order.gather(2, last)[..., 0])

    def release_rule(self, slots: Tensor) -> ReleaseRule:
        """Describe `release`."""
        pool = self.options.kernel if self.options.decode_pool else 1
        return ReleaseRule("step", (slots - 1).clamp(min=1, max=self.options.window), pool=pool)

    def _pooled(self, scores: Tensor) -> Tensor:
        """Average a step's scores over neighbours, unless the options say no."""
        return pooled(scores, self.options.kernel, "avg") if self.options.decode_pool else scores

    def _cascade(self, view: PrefillView, window: int) -> Cascade:
        """Return the row's cascade, new at the first layer."""
        (row,) = view.rows  # a policy that revises is shown one row at a time
        cascades = view.shared.setdefault(CASCADES, {})
        if view.layer == 0:
            sizes = [x.shape[1] * x.shape[3] * x.element_size() for x in (view.keys, view.values)]
            total = view.layers * (view.slots - window)
            cascades[row] = Cascade(view.layers, total, view.length - window, window, sum(sizes))
        return cascades[row]


def _with_window(chosen: Tensor, length: int, window: int) -> Tensor:
    """Append the last ``window`` of ``length`` entries to the chosen ones."""
    recent = torch.arange(length - window, length, device=chosen.device)
    return torch.cat([chosen, recent.expand(*chosen.shape[:-1], window)], dim=-1)
