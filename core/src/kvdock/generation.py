"""How `generate()` of an attached model meets the dock: what is refused, where prefill ends."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvdock.cache import DockCache
from kvdock.compat import CACHE, CACHE_NAMES, check_reached
from kvdock.decode import make_decoder
from kvdock.errors import UnsupportedError
from kvdock.report import held_bytes
from kvdock.session import Session

if TYPE_CHECKING:
    from kvdock.attach import Dock


class Clock:
    """Time prefill and decode without adding a synchronisation: CUDA events, read later."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Note the present moment of the device."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, interval: int) -> float | None:
        """Return the length of an interval between two marks, None if it has not ended."""
        if interval + 1 >= len(self._marks):
            return None
        start, stop = self._marks[interval : interval + 2]
        if self._cuda:
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3
        return float(stop - start)


class PrefillEnd(LogitsProcessor):
    """Mark the end of the prompt: the first scores come after its last chunk, before any decode."""

    def __init__(self, cache: DockCache, clock: Clock) -> None:
        self.cache = cache
        self.clock = clock
        self.calls = 0
        self.bytes_after_prefill: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores untouched."""
        if self.calls == 0:
            self.cache.end_prefill()
            self.clock.mark()
            self.bytes_after_prefill = held_bytes(self.cache)
        self.calls += 1
        return scores


def docked_generate(dock: Dock, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `generate` that uses the dock's cache, to stand on the instance."""
    signature = inspect.signature(original)

    def generate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        cache = _cache_for(dock, given)
        cache.session.begin_turn(_prompt_columns(given))
        clock = Clock(dock.device)
        ending = PrefillEnd(cache, clock)
        given[CACHE] = cache
        given["logits_processor"] = LogitsProcessorList(
            [*(given.get("logits_processor") or ()), ending]
        )
        session = cache.session
        session.generating, before = True, session.columns
        session.decoder = make_decoder(dock.plan.decode, _decode_settings(dock, given, session))
        try:
            output = original(**given)
        finally:
            session.generating = False
            session.thaw()
            session.decoder = None
            clock.mark()
            dock.note(cache, ending)
        # a generate of the caller's own need not use the processors
        check_reached(
            session.columns > before, ending.calls > 0 or bool(given.get("custom_generate"))
        )
        return output

    return generate


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """Stand in for ``generate_batch`` while a model is attached."""
    raise UnsupportedError(
        "continuous batching keeps its own paged cache, which no policy can act on. Use"
        " model.generate(...) with a batch, or detach first."
    )


def refuse_copy(memo: dict[int, Any]) -> Any:
    """Stand in for the copy of an attached model, which would go on using this one's layers."""
    raise UnsupportedError(
        "an attached model cannot be copied: the copy would run on the original's layers and dock."
        " Detach, copy, and attach to each."
    )


def _cache_for(dock: Dock, given: dict[str, Any]) -> DockCache:
    """Check the arguments of one `generate` call and return the cache it will fill."""
    setting = _settings(dock, given)
    take_back = "it takes tokens back, and evicted entries cannot be restored"
    refused = {
        "assistant_model": take_back,
        "prompt_lookup_num_tokens": take_back,
        "assistant_early_exit": take_back,
        "cache_implementation": "the dock brings its own cache (no static or offloaded one)",
        "output_attentions": "it needs the full T×T probabilities, which kvdock never forms",
    }
    for name, reason in refused.items():
        if setting(name):
            raise UnsupportedError(f"{name} is not possible on a docked model: {reason}.")
    if setting("use_cache") is False:
        raise UnsupportedError("use_cache=False leaves nothing to compress. Remove it, or detach.")
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask has {mask.dim()} dimensions; kvdock takes the 2-D mask"
            " [batch, columns]."
        )
    dock.check_mode()
    caches = {name: given.pop(name) for name in CACHE_NAMES if given.get(name) is not None}
    if not caches:
        return dock.new_cache()
    if len(caches) > 1:
        raise UnsupportedError(f"{' and '.join(caches)} are both given; pass one cache.")
    ((name, cache),) = caches.items()
    if not isinstance(cache, DockCache) or cache.plan is not dock.plan:
        raise UnsupportedError(
            f"{name} is a {type(cache).__name__} that this dock did not make. Leave it"
            " out, or pass dock.new_cache() (or the cache of an earlier turn with this dock)."
        )
    return cache


def _settings(dock: Dock, given: dict[str, Any]) -> Callable[[str], Any]:
    """Return what looks a setting up as `generate` does: its arguments before the config."""
    config = given.get("generation_config") or dock.model.generation_config

    def setting(name: str) -> Any:
        return given[name] if given.get(name) is not None else getattr(config, name, None)

    return setting


def _decode_settings(dock: Dock, given: dict[str, Any], session: Session) -> dict[str, Any]:
    """Return what a decoder has to know of the call: its loop, and how many steps it can make."""
    setting = _settings(dock, given)
    new, longest = setting("max_new_tokens"), setting("max_length")
    if new is None and longest is not None:
        new = longest - (session.prompt_columns or 0)
    return {
        "steps": None if new is None else max(0, new - 1),  # the first token comes from the prompt
        "num_beams": setting("num_beams"),
        "custom_generate": given.get("custom_generate"),
    }


def _prompt_columns(given: dict[str, Any]) -> int:
    """Return the columns of the whole history: earlier turns' and the new prompt's."""
    sizes = []
    for name in ("inputs", "input_ids", "inputs_embeds", "attention_mask"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            sizes.append(value.shape[1])
    return max(sizes, default=1)
