"""SnapKV's selection (section 4 of the paper), on key/value heads.

Shapes: b rows, K key/value heads, N entries, C kept entries, W window, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.budget import Budget
from kvdock.errors import BudgetError
from kvdock.kernels.selection import top_positions
from kvdock.kernels.window_scores import window_votes
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
        assert view.queries is not None
        window = max(1, min(view.queries.shape[2], view.slots - 1))
        queries = view.queries[:, :, view.queries.shape[2] - window :]
        prefix = view.length - window
        votes = window_votes(queries, view.keys, view.params)[..., :prefix]
        chosen = top_positions(self.pool(votes), view.slots - window)
        recent = torch.arange(prefix, view.length, device=chosen.device)
        recent = recent.expand(*chosen.shape[:-1], window)
        return Selection(torch.cat([chosen, recent], dim=-1))

    def pool(self, votes: Tensor) -> Tensor:
        """Pool votes [b, K, N] along the sequence; max pads with −∞, avg with zeros."""
        kernel = self.options.kernel
        pool = F.max_pool1d if self.options.pooling == "max" else F.avg_pool1d
        return pool(votes, kernel, stride=1, padding=kernel // 2)
