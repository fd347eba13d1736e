"""PyramidKV's budgets (section 4 of the paper) around SnapKV's selection, on key/value heads.

Shapes: C slots per layer on average, W window, n tokens of the row.
"""

from collections.abc import Sequence

from kvdock.budget import Budget
from kvdock.errors import BudgetError
from kvdock.kernels.window_scores import keep_window
from kvdock.policy import CachePolicy, PrefillView, Selection
from kvdock_pyramidkv.options import PyramidKVOptions
from kvdock_pyramidkv.pyramid import exact_budgets, official_budgets


class PyramidKVPolicy(CachePolicy):
    """Keep the window and the best-voted prefix entries, more of them in lower layers.

    Layer l keeps n_l + W entries; n_l falls evenly from 2·(C − W) − (C − W)/β to (C − W)/β, at most
    n − W, with mean C − W.
    """

    def __init__(self, options: PyramidKVOptions) -> None:
        self.options = options
        self.query_window = options.window
        self.acts_on_later_turns = options.recompress

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget that the options make impossible."""
        if budget.kind == "tokens" and budget.amount <= self.options.window:
            raise BudgetError(
                f"pyramidkv: budget {budget} leaves nothing beside window={self.options.window}."
                " Raise the budget or lower window."
            )
        if budget.kind == "bytes" and self.options.rounding == "official":
            raise BudgetError(
                f"pyramidkv: rounding='official' exceeds its total, so it cannot keep to {budget}."
                " Use rounding='exact' or a budget of slots."
            )

    def layer_slots(self, tokens: int, slots: int, layers: int) -> Sequence[int]:
        """Return n_l + W for every layer l."""
        window = max(1, min(self.options.window, slots - 1))
        base, cap = slots - window, tokens - window
        if base == 0:
            return [slots] * layers
        if self.options.rounding == "exact":
            counts = exact_budgets(base, cap, layers, self.options.beta)
        elif tokens < 2 * base:  # the authors' code is level here
            return [slots] * layers
        else:
            counts = official_budgets(base, cap, layers, self.options.beta)
        return [count + window for count in counts]

    def select(self, view: PrefillView) -> Selection:
        """Return the kept entries of every key/value head."""
        return keep_window(view, kernel=self.options.kernel, pooling=self.options.pooling)
