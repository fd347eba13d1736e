"""SnapKV's selection (section 4 of the paper), on key/value heads.

Shapes: k a key/value head, j an entry, r a query; C kept entries, W window, D head_dim.
"""

from kvdock.budget import Budget
from kvdock.errors import BudgetError
from kvdock.kernels.window_scores import keep_window
from kvdock.policy import CachePolicy, PrefillView, Selection
from kvdock_snapkv.options import SnapKVOptions


class SnapKVPolicy(CachePolicy):
    """Keep the window and the prefix entries with the highest pooled votes.

    votes  v[k, j] = mean over the group of Σ_{r in window} softmax(q_r·K/√D)[j]
    pooled v̂ = pool_kernel(v), then the top C − W of v̂, ties to the lower position.
    """

    def __init__(self, options: SnapKVOptions) -> None:
        self.options = options
        self.query_window = options.window
        self.acts_on_later_turns = options.recompress

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget of slots that the window alone would fill."""
        if budget.kind == "tokens" and budget.amount <= self.options.window:
            raise BudgetError(
                f"snapkv: budget {budget} leaves nothing beside window={self.options.window}."
                " Raise the budget or lower window."
            )

    def select(self, view: PrefillView) -> Selection:
        """Return the C kept entries of every key/value head."""
        return keep_window(view, kernel=self.options.kernel, pooling=self.options.pooling)
