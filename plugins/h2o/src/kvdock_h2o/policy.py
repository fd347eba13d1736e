"""H2O's eviction (algorithm 1 of the paper), on key/value heads.

Shapes: B or b rows, K key/value heads, G query heads per key/value head, N entries or slots;
C = H + R kept entries: H heavy hitters, R recent ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdock.budget import Budget
from kvdock.errors import BudgetError
from kvdock.kernels.selection import top_positions
from kvdock.policy import CachePolicy, DecodeView, PrefillView, Release, Selection
from kvdock.release import ReleaseRule
from kvdock_h2o.options import H2OOptions
from kvdock_h2o.scores import column_sums, step_sums

SCORE = "score"


class H2OPolicy(CachePolicy):
    """Keep the H entries with the largest accumulated attention and the R most recent ones.

    Every query ever seen adds its probabilities: s[k, j] = mean over the group of Σ_i A[i, j], from
    the first prompt to the last decode step. After the prompt the H largest stay; then, at every
    step over the budget, the smallest score that is not recent goes.
    """

    acts_on_decode = True
    acts_on_later_turns = True
    observes_prompt = True
    observes_decode = True
    reads_lse = True

    def __init__(self, options: H2OOptions) -> None:
        self.options = options

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget of slots that cannot hold both halves."""
        if budget.kind != "tokens":
            return
        if budget.amount < 2:
            raise BudgetError(
                f"h2o: budget {budget} cannot hold a heavy hitter and a recent token."
                " Raise it to 2 or more."
            )
        heavy, recent = self.options.heavy, self.options.recent
        if (heavy or 1) + (recent or 1) > budget.amount:
            asked = {"heavy": heavy, "recent": recent}
            named = " + ".join(f"{name}={n}" for name, n in asked.items() if n is not None)
            rest = "" if heavy and recent else f" and leaves no room for the {_other(heavy)} ones"
            raise BudgetError(
                f"h2o: {named} exceeds budget {budget}{rest}. Raise the budget or lower {named}."
            )

    def layer_slots(self, tokens: int, slots: int, layers: int) -> Sequence[int]:
        """Give every layer the budget, or heavy + recent where both are set and ask for less."""
        if self.options.heavy and self.options.recent:
            slots = min(slots, self.options.heavy + self.options.recent)
        return [slots] * layers

    def recent(self, slots: int) -> int:
        """Return R for an allowance of C slots; at least 1, at most C − 1 where C > 1."""
        if self.options.recent is not None:
            wanted = self.options.recent
        else:
            heavy = self.options.heavy
            wanted = slots - (slots // 2 if heavy is None else heavy)
        return max(1, min(wanted, slots - 1))

    def observe_prompt(self, view: PrefillView) -> dict[str, Tensor]:
        """Add the probabilities of this forward's queries to the entries' scores."""
        assert view.queries is not None
        sums = column_sums(view.queries, view.keys, view.params, view.lse)
        return {SCORE: self._accumulated(sums, view)}

    def observe_step(self, view: DecodeView) -> dict[str, Tensor]:
        """Add the probabilities of the step's query."""
        sums = step_sums(view.queries, view.keys, view.positions >= 0, view.params)
        return {SCORE: self._accumulated(sums, view)}

    def select(self, view: PrefillView) -> Selection:
        """Keep the H largest scores outside the recent entries, and those."""
        recent = self.recent(view.slots)
        prefix = view.length - recent
        heavy = top_positions(view.slot_state[SCORE][..., :prefix], view.slots - recent)
        last = torch.arange(prefix, view.length, device=heavy.device)
        return Selection(torch.cat([heavy, last.expand(*heavy.shape[:-1], recent)], dim=-1))

    def release(self, view: DecodeView) -> Release:
        """Give up the smallest score outside the recent entries; ties go at the highest position.

        The last R tokens were never evicted, so positions alone tell them.
        """
        position = view.positions.long()
        recent = self._recent_rows(view.slots)
        last = position.amax(dim=2, keepdim=True)
        old = (position >= 0) & (position <= last - recent[:, None, None])
        # scores are not negative, so their bits order as they do; equal ones fall to the position
        bits = view.slot_state[SCORE].view(torch.int32).long()
        rank = (bits << 32) | (0xFFFFFFFF - position)
        return Release(rank.masked_fill(~old, torch.iinfo(torch.int64).max).argmin(dim=2))

    def release_rule(self, slots: Tensor) -> ReleaseRule:
        """Describe `observe_step` and `release`."""
        mean = self.options.reduce == "mean"
        return ReleaseRule("sum", self._recent_rows(slots), state=SCORE, mean=mean)

    def _accumulated(self, sums: Tensor, view: PrefillView | DecodeView) -> Tensor:
        """Return the old scores and this forward's, group sums [b, K, N] reduced as asked."""
        if self.options.reduce == "mean":
            assert view.queries is not None
            sums = sums / (view.queries.shape[1] // view.keys.shape[1])
        before = view.slot_state.get(SCORE)
        return sums if before is None else before + sums

    def _recent_rows(self, slots: Tensor) -> Tensor:
        """Return `recent` for every row's allowance, int64 [B]."""
        if self.options.recent is not None:
            wanted = torch.full_like(slots, self.options.recent)
        else:
            heavy = self.options.heavy
            wanted = slots - (slots // 2 if heavy is None else heavy)
        return wanted.minimum(slots - 1).clamp(min=1)


def _other(heavy: int | None) -> str:
    return "heavy" if heavy is None else "recent"
