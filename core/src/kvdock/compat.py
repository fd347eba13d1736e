"""The only file that knows how transformers versions differ; it probes and fails loudly."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor

from kvdock.errors import UnsupportedError

SUPPORTED = "transformers>=5.4,<6"


def _lacking(features: str) -> UnsupportedError:
    return UnsupportedError(
        f"transformers {transformers.__version__} lacks {features}, which kvdock needs. Install a"
        f" version in the supported range: pip install '{SUPPORTED}'."
    )


try:
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
    from transformers.generation.utils import GenerationMixin
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
except ImportError as error:
    raise _lacking(f"what kvdock imports ({error})") from error

IMPLEMENTATION = "kvdock"
"""The name under which the attention and the mask function are registered together."""

CACHE_NAMES = ("past_key_values", "cache")
"""What models and `generate` called their cache before transformers 5.24, and since then."""

_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARED else "past_key_values"
"""The name that the installed release takes without a warning."""

FULL, SLIDING = "full_attention", "sliding_attention"

_users = 0


def probe() -> None:
    """Check every transformers feature the core builds on; raise naming the missing ones."""
    missing = [name for name, present in _features() if not present]
    if missing:
        raise _lacking(", ".join(missing))


def _features() -> Iterator[tuple[str, bool]]:
    attributes = {
        AttentionInterface: ("register", "_global_mapping"),
        AttentionMaskInterface: ("register", "_global_mapping"),
        PreTrainedModel: ("set_attn_implementation",),
        CacheLayerMixin: ("update", "lazy_initialization", "get_seq_length", "get_mask_sizes"),
        transformers.PreTrainedConfig: ("get_text_config", "_attn_implementation"),
    }
    # dir() leaves out what hasattr() finds on the metaclass: ABCMeta has a `register` of its own
    for cls, names in attributes.items():
        for name in names:
            yield f"{cls.__name__}.{name}", name in dir(cls)
    parameters: tuple[tuple[Any, str, str], ...] = (
        (DynamicLayer, "get_mask_sizes", "query_length"),
        (DynamicCache, "__init__", "config"),
        (Cache, "__init__", "layers"),
        (GenerationMixin, "generate", "logits_processor"),
        (GenerationMixin, "generate", "generation_config"),
    )
    for cls, function, parameter in parameters:
        known = inspect.signature(getattr(cls, function)).parameters
        owner = "CacheLayerMixin" if cls is DynamicLayer else cls.__name__
        yield f"{owner}.{function}({parameter})", parameter in known


def check_reached(seen: bool, ended: bool) -> None:
    """Refuse the result of a `generate` that went past kvdock, which a newer version might do.

    Args:
        seen: whether keys and values arrived in the dock's cache.
        ended: whether the end of the prompt was announced by the logits processor.
    """
    if seen and ended:
        return
    what = "never announced the end of the prompt" if seen else "never filled the dock's cache"
    raise UnsupportedError(
        f"generate() of transformers {transformers.__version__} {what}, so nothing was compressed"
        f" and the result is not returned. Tested versions are in envs/README.md; install one:"
        f" pip install '{SUPPORTED}'."
    )


@contextmanager
def registered(attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Register both functions while at least one model is attached, and take them out again."""
    global _users
    if _users == 0:
        AttentionInterface.register(IMPLEMENTATION, attention)
        AttentionMaskInterface.register(IMPLEMENTATION, mask)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if _users == 0:
            AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)
            AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)


@contextmanager
def implementation(model: PreTrainedModel) -> Iterator[str]:
    """Switch the model's attention to kvdock and give every config its own value back after."""
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    name = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        if _reads_interface(model):
            model.set_attn_implementation(IMPLEMENTATION)
        if model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
            raise UnsupportedError(
                f"{type(model).__name__} does not go through transformers' attention interface, so"
                " no method can act on it. kvdock works with models whose implementation can"
                " be set (llama, mistral, qwen2, qwen3, glm4 and most decoder-only models)."
            )
        yield name or "sdpa"
    finally:
        for config, value in before:
            config._attn_implementation_internal = value


def _reads_interface(model: PreTrainedModel) -> bool:
    """Say whether a modeling file behind the model imports the table of attention functions.

    `set_attn_implementation` guesses by the names of classes and accepts some that never read it.
    """
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


def _configs(model: PreTrainedModel) -> list[Any]:
    found = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    for config in list(found.values()):
        for name in getattr(config, "sub_configs", {}):
            sub = getattr(config, name, None)
            if sub is not None:
                found[id(sub)] = sub
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def splits_states(model: Any, name: str, layer: Any) -> bool | None:
    """Say whether transformers' plan gives every process its part of a layer's states.

    Returns:
        None where no plan names the layer. False too where a weight is split, but its output is
        gathered ("colwise_gather_output") or its input cut here ("rowwise_split_input").
    """
    style = getattr(layer, "_hf_tp_plan", None)
    if style is None:
        plan = getattr(model, "tp_plan", None) or {}
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    return None if style is None else str(style).endswith("wise")


def plain_mesh(layer: Any) -> Any:
    """Return the processes that share a layer whose weights are plain tensors.

    So it is with transformers 5.4; later the weights are DTensors and know it themselves.
    """
    return getattr(layer, "_hf_device_mesh", None)


def passthrough_layers(config: Any) -> list[Any]:
    """Return the cache layers transformers itself would use, one per layer of the model.

    Sliding-window layers hand their states over in a handle, since attention is ours; the layers
    kvdock manages are replaced by the caller.
    """
    layers = list(DynamicCache(config=config).layers)
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            layers[index] = SlidingLayer(sliding_window=layer.sliding_window)
    return layers


def managed_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the plain full-attention layers, which kvdock manages."""
    layers = DynamicCache(config=config).layers
    types = getattr(config, "layer_types", None) or []
    odd = sorted({kind for kind in types if kind in ("chunked_attention", "indexed_attention")})
    if odd:
        raise UnsupportedError(
            f"layers of type {', '.join(odd)} need masks kvdock does not build; full_attention,"
            " sliding_attention and linear layers are supported."
        )
    return tuple(index for index, layer in enumerate(layers) if type(layer) is DynamicLayer)


class PlainHandle:
    """Carry the plain states of a layer kvdock does not manage to the attention function."""

    __slots__ = ("key", "value")

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value


class SlidingLayer(DynamicSlidingWindowLayer):
    """Store what transformers stores for a sliding window; only the hand-over differs."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the stored states in a handle, twice."""
        handle = PlainHandle(*super().update(key_states, value_states, *args, **kwargs))
        return handle, handle
