"""Keep a uniform random subset of the entries of every key/value head."""

import torch

from kvdock.kernels.selection import top_positions
from kvdock.policy import CachePolicy, ModelFacts, PrefillView, Selection
from kvdock.shard import WHOLE
from kvdock_bench.control import RandomOptions


class RandomPolicy(CachePolicy):
    """Draw once per layer and length, so that a row's set does not depend on its batch."""

    def __init__(self, options: RandomOptions) -> None:
        self.options = options
        self._shard = WHOLE

    def bind(self, facts: ModelFacts) -> None:
        """Remember which of the model's heads are here: every head has its own draw."""
        self._shard = facts.shard

    def select(self, view: PrefillView) -> Selection:
        """Return C random entries per key/value head, the window always among them."""
        b, kv_heads, n, _ = view.keys.shape
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + view.layer)
        draw = torch.rand(kv_heads * self._shard.size, n, generator=generator)
        draw = draw[self._shard.place(kv_heads)]
        window = min(self.options.window, view.slots)
        draw[:, n - window :] = 2.0
        index = top_positions(draw.to(view.keys.device), view.slots)
        return Selection(index.expand(b, kv_heads, view.slots))
