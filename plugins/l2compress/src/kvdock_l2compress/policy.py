"""L2Compress's selection (section 3 of the paper): no queries, no probabilities, only norms.

Shapes: b rows, K key/value heads, N entries, C kept entries, D head_dim.
"""

from collections.abc import Sequence

import torch

from kvdock.budget import Budget
from kvdock.errors import BudgetError, UnsupportedError
from kvdock.kernels.selection import top_positions
from kvdock.policy import CachePolicy, ModelFacts, PrefillView, Selection
from kvdock_l2compress.options import L2CompressOptions


class L2CompressPolicy(CachePolicy):
    """Keep the C entries whose keys have the lowest norm, ties to the lower position.

    score s[k, j] = −‖K[k, j]‖₂; layers of ``skip_layers`` keep everything.
    """

    def __init__(self, options: L2CompressOptions) -> None:
        self.options = options
        self.acts_on_later_turns = options.recompress

    def bind(self, facts: ModelFacts) -> None:
        """Refuse to skip a layer the model does not have."""
        missing = [layer for layer in self.options.skip_layers if layer >= facts.layers]
        if missing:
            raise UnsupportedError(
                f"l2compress: skip_layers names layer {missing[0]}, but the model has"
                f" {facts.layers} layers that can be compressed (0 to {facts.layers - 1})."
            )

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget that the options make impossible."""
        if budget.kind == "tokens" and budget.amount <= self.options.recent:
            raise BudgetError(
                f"l2compress: budget {budget} leaves nothing beside recent={self.options.recent}."
                " Raise the budget or lower recent."
            )
        if budget.kind == "bytes" and self.options.skip_layers:
            raise BudgetError(
                f"l2compress: budget {budget} cannot bound skipped layers, which keep everything."
                " Use a budget of slots, or skip_layers=()."
            )

    def layer_slots(self, tokens: int, slots: int, layers: int) -> Sequence[int]:
        """Let skipped layers keep the whole row."""
        skipped = self.options.skip_layers
        return [tokens if layer in skipped else slots for layer in range(layers)]

    def select(self, view: PrefillView) -> Selection:
        """Return the C kept entries of every key/value head."""
        # half-precision norms would tie almost everywhere
        norms = torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32)
        recent = min(self.options.recent, view.slots)
        norms[..., view.length - recent :] = -1  # below every norm
        return Selection(top_positions(-norms, view.slots))
