"""Attach methods to a model and take them off again, leaving nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvdock import compat
from kvdock.attention import build_layout, dock_attention
from kvdock.budget import Budget
from kvdock.cache import DockCache
from kvdock.compose import Composition, compose
from kvdock.decode import choose_mode, docked_forward
from kvdock.errors import UnsupportedError
from kvdock.generation import (
    PrefillEnd,
    docked_generate,
    refuse_continuous_batching,
    refuse_copy,
)
from kvdock.kernels import choose_backend
from kvdock.kernels.reference import ReferenceBackend
from kvdock.kernels.sparse import dense_beside
from kvdock.plan import DockPlan
from kvdock.policy import ModelFacts
from kvdock.registry import default_host
from kvdock.report import Report, make_report
from kvdock.rope import make_rotation, make_turns
from kvdock.shard import find_shard
from kvdock.slicing import sliced


class Dock:
    """Hold methods attached to a model until the ``with`` block ends or `detach` is called."""

    def __init__(self, model: PreTrainedModel, plan: DockPlan, exits: ExitStack) -> None:
        self.model = model
        self.plan = plan
        self.cache: DockCache | None = None
        self._exits = exits
        self._ending: PrefillEnd | None = None

    @property
    def device(self) -> torch.device:
        """Return the device of the model's first layers."""
        return self.model.device

    def new_cache(self, prompt_length: int | None = None) -> DockCache:
        """Return an empty cache for ``model(..., past_key_values=cache)``.

        Args:
            prompt_length: columns of the prompt when it is fed in several forwards; without it the
                first forward is the whole prompt.
        """
        self._check_attached()
        self.cache = DockCache(self.plan, prompt_length)
        self._ending = None
        return self.cache

    def report(self) -> Report:
        """Return what the last cache holds; raises when held and predicted bytes differ."""
        cache = self._last_cache()
        ending = self._ending
        if ending is None:
            return make_report(cache, None, None, None)
        decode, steps = ending.clock.seconds(1), ending.calls - 1
        per_token = decode / steps if decode is not None and steps > 0 else None
        return make_report(cache, ending.bytes_after_prefill, ending.clock.seconds(0), per_token)

    def kept_positions(self, layer: int) -> Tensor:
        """Return the positions a layer holds, int64 [B, K, C], ascending; −1 is an empty slot.

        Positions count a row's real tokens from 0; pads have none.

        Args:
            layer: the model's layer index.
        """
        cache = self._last_cache()
        if layer not in self.plan.managed:
            raise UnsupportedError(
                f"layer {layer} is not managed; managed layers are {list(self.plan.managed)}."
            )
        docked = cache.docked[self.plan.managed.index(layer)]
        return docked.store.storage.kept_positions()

    def detach(self) -> None:
        """Give the model back as it was found; a second call does nothing."""
        self.plan.attached = False
        self._exits.close()

    def __enter__(self) -> Dock:
        self._check_attached()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def note(self, cache: DockCache, ending: PrefillEnd) -> None:
        """Remember the cache and the times of the last `generate`."""
        self.cache, self._ending = cache, ending

    def check_mode(self) -> None:
        """Refuse a model that was put into training mode, or told otherwise, after `attach`."""
        self._check_attached()
        _check_eval(self.model)

    def _check_attached(self) -> None:
        if not self.plan.attached:
            raise UnsupportedError("this dock was detached. Call kvdock.attach(...) again.")

    def _last_cache(self) -> DockCache:
        if self.cache is None:
            raise UnsupportedError("nothing ran yet: call model.generate(...) or dock.new_cache().")
        return self.cache


def attach(
    model: Any,
    methods: str | Sequence[Any],
    *,
    budget: int | str | Budget | None = None,
    backend: str | None = None,
    graph: str | bool = "auto",
    slice_above: int | None = 16384,
    **options: Any,
) -> Dock:
    """Attach methods to a model; see `kvdock.attach`."""
    compat.probe()
    _check_model(model)
    composition = compose(default_host(), methods, budget, options)
    if backend is None:
        backend = _asked_for(model, composition)
    config = model.config.get_text_config(decoder=True)
    managed = compat.managed_layers(config)
    if not managed:
        raise UnsupportedError(
            f"{type(model).__name__} has no full-attention layer, so there is nothing to compress."
        )
    _check_dtype(model.dtype, composition)
    rotate, reason = make_rotation(model, managed)
    facts = ModelFacts(
        len(managed),
        rotate,
        reason,
        config,
        model.device,
        model.dtype,
        _head_dim(config),
        make_turns(model, managed),
        find_shard(model, config),
    )
    if composition.cache_policy is not None:
        composition.cache_policy.bind(facts)
    for storage in (composition.channel_policy, composition.format_policy):
        if storage is not None:
            storage.bind(facts)
    if composition.attention_policy is not None:
        composition.attention_policy.bind(facts, backend)
        backend = dense_beside(backend)
    with ExitStack() as stack:
        stack.enter_context(compat.registered(dock_attention, build_layout))
        previous = stack.enter_context(compat.implementation(model))
        plan = DockPlan(
            methods=composition.names,
            cache_policy=composition.cache_policy,
            attention_policy=composition.attention_policy,
            channel_policy=composition.channel_policy,
            format_policy=composition.format_policy,
            budget=composition.budget,
            backend=choose_backend(backend, previous, model.device, model.dtype),
            fallback=ReferenceBackend(),
            facts=facts,
            config=config,
            managed=managed,
        )
        stack.enter_context(sliced(model, slice_above))
        dock = Dock(model, plan, ExitStack())
        _override(stack, model, "generate", docked_generate(dock, model.generate))
        plan.decode = choose_mode(model, plan, graph)
        if plan.decode is not None:
            _override(stack, model, "forward", docked_forward(dock, model.forward))
        _override(stack, model, "__deepcopy__", refuse_copy)
        for name in (
            "generate_batch",
            "init_continuous_batching",
            "continuous_batching_context_manager",
        ):
            if hasattr(model, name):
                _override(stack, model, name, refuse_continuous_batching)
        dock._exits = stack.pop_all()
    return dock


def _asked_for(model: PreTrainedModel, composition: Composition) -> str | None:
    """Return the kernel that a plugin insists on, None where none does."""
    op = "prefill" if composition.attention_policy is None else "sparse-prefill"
    dtype = str(model.dtype).removeprefix("torch.")
    return default_host().select_kernel(op, model.device.type, dtype)


def _head_dim(config: Any) -> int | None:
    """Return the size of a head, None for an architecture that has no heads."""
    own, heads = (getattr(config, name, None) for name in ("head_dim", "num_attention_heads"))
    if own or not heads:
        return own
    return int(config.hidden_size // heads)


def _override(stack: ExitStack, model: Any, name: str, value: Any) -> None:
    """Set an attribute of the instance until the stack is closed."""
    had, before = name in model.__dict__, model.__dict__.get(name)
    model.__dict__[name] = value

    def restore() -> None:
        if had:
            model.__dict__[name] = before
        else:
            del model.__dict__[name]

    stack.callback(restore)


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"expected a transformers PreTrainedModel, found {type(model).__name__}. For a PEFT"
            " model pass model.get_base_model()."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder; kvdock serves decoders."
        )
    if model.config.get_text_config(decoder=True)._attn_implementation == compat.IMPLEMENTATION:
        raise UnsupportedError("this model is attached already. Detach its dock first.")
    _check_eval(model)


def _check_eval(model: Any) -> None:
    if model.training:
        raise UnsupportedError(
            "the model is in training mode; kvdock is for inference. Call model.eval() first."
        )
    if model.config.get_text_config(decoder=True).output_attentions:
        raise UnsupportedError(
            "the model's config sets output_attentions, which needs the full T×T probabilities that"
            " kvdock never forms. Set model.config.output_attentions = False."
        )


def _check_dtype(dtype: torch.dtype, composition: Composition) -> None:
    name = str(dtype).removeprefix("torch.")
    for method in composition.methods:
        if name not in method.capabilities.dtypes:
            raise UnsupportedError(
                f"{method.name} supports {', '.join(method.capabilities.dtypes)}; the model is"
                f" {name}."
            )
