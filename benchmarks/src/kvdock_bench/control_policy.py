"""Keep a uniform random subset of the entries of every key/value head."""

import torch

from kvdock.kernels.selection import top_positions
from kvdock.policy import CachePolicy, PrefillView, Selection
from kvdock_bench.control import RandomOptions


class RandomPolicy(CachePolicy):
    """Draw once per layer and length, so that a row's set does not depend on its batch."""

    def __init__(self, options: RandomOptions) -> None:
        self.options = options

    def select(self, view: PrefillView) -> Selection:
        """Return C random entries per key/value head, the window always among them."""
        b, kv_heads, n, _ = view.keys.shape
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + view.layer)
        draw = torch.rand(kv_heads, n, generator=generator)
        window = min(self.options.window, view.slots)
        draw[:, n - window :] = 2.0
        index = top_positions(draw.to(view.keys.device), view.slots)
        return Selection(index.expand(b, kv_heads, view.slots))
