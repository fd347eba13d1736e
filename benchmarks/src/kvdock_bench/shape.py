"""How many bytes a full KV cache takes, from the model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KVShape:
    """Layers, KV heads and head sizes of a cache; sliding layers hold at most their window."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int
    sliding_layers: int = 0
    window: int = 0

    def slot_bytes(self, item_bytes: int) -> int:
        """Return the bytes of one token over all layers that keep every token."""
        return self.layers * self._layer_bytes(item_bytes)

    def full_bytes(self, tokens: int, item_bytes: int) -> int:
        """Return the bytes of the plain cache of one prompt."""
        sliding = self.sliding_layers * min(tokens, self.window) * self._layer_bytes(item_bytes)
        return tokens * self.slot_bytes(item_bytes) + sliding

    def _layer_bytes(self, item_bytes: int) -> int:
        return self.heads * (self.key_dim + self.value_dim) * item_bytes


def kv_shape(config: Any) -> KVShape:
    """Read the cache's shape from a transformers config."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = getattr(text, "layer_types", None) or []
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    # layers that are neither (linear attention) hold a state that does not grow with the prompt
    full = sum(kind == "full_attention" for kind in kinds) if kinds else text.num_hidden_layers
    return KVShape(
        layers=full,
        heads=getattr(text, "num_key_value_heads", None) or heads,
        key_dim=dim,
        value_dim=dim,
        sliding_layers=sliding,
        window=getattr(text, "sliding_window", None) or 0,
    )
