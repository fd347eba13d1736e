"""The attention and mask functions registered with transformers under the name ``kvdock``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdock.cache import DockLayer, KVHandle
from kvdock.compat import PlainHandle
from kvdock.errors import UnsupportedError
from kvdock.kernels.windowed import attend_window
from kvdock.layout import BatchLayout
from kvdock.policy import AttentionParams


def build_layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> BatchLayout:
    """Return the forward's layout in place of a mask; registered as the mask function."""
    if isinstance(q_offset, Tensor):
        raise UnsupportedError(
            "a static cache was passed to a docked model. Use the cache of the dock:"
            " model.generate(...) without past_key_values, or past_key_values=dock.new_cache()."
        )
    if not allow_is_causal_skip:
        raise UnsupportedError(
            "this forward asks for more than a causal mask (packed sequences, prefix or image"
            " blocks, a static cache). kvdock serves causal decoding with a 2-D attention mask and"
            " the dock's own cache."
        )
    return BatchLayout(attention_mask, batch_size, q_length, int(q_offset), window=local_size)


def dock_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with a layer's handle; registered as the attention function.

    Args:
        query: [B, H, Q, D], after RoPE.
        key: the handle `DockLayer.update` returned.
        attention_mask: the forward's `BatchLayout`.

    Returns:
        ([B, Q, H, D], None).
    """
    _check_call(module, key, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    params = AttentionParams(scale, softcap, s_aux)
    layout: BatchLayout = attention_mask
    if isinstance(key, PlainHandle):
        window = layout.window or layout.seen + layout.columns
        output = attend_window(
            query, key.key, key.value, params, window=window, seen=layout.seen, mask=layout.mask
        )
        return output, None
    layer: DockLayer = key.layer
    if getattr(module, "config", layer.session.plan.config) is not layer.session.plan.config:
        raise UnsupportedError(
            "this cache was made for another model. Start one with that model's dock.new_cache()."
        )
    return layer.session.attend(layer.rank, query, key.key, key.value, layout, params), None


def _check_call(module: torch.nn.Module, key: Any, layout: Any, kwargs: dict[str, Any]) -> None:
    if not isinstance(key, KVHandle | PlainHandle):
        raise UnsupportedError(
            f"a docked model was called with {type(key).__name__} instead of the dock's cache. Use"
            " model.generate(...), or pass past_key_values=dock.new_cache() to the model."
        )
    if not isinstance(layout, BatchLayout):
        raise UnsupportedError(
            "kvdock builds its masks from the 2-D attention mask [batch, columns]; a custom 4-D"
            " mask (or none from the model) cannot be followed by a compressed cache."
        )
    if module.training:
        raise UnsupportedError("a docked model is for inference: call model.eval() first.")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise UnsupportedError(
            "output_attentions=True needs the full T×T probabilities, which kvdock never forms."
        )
