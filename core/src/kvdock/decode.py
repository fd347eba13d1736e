"""Decode in fixed shapes after the prompt, captured as a CUDA graph where that is possible.

`generate()` of an attached model runs a step as a forward of one new column. The dock stands before
the model's forward: it freezes the cache's layers at the first step, lets the model run one step as
it is, captures the next one and replays it from then on. Whoever calls `generate()` sees the same
outputs either way.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvdock.compat import CACHE
from kvdock.errors import UnsupportedError
from kvdock.frozen import FrozenCache, has_kernel
from kvdock.graph import CaptureError, StepGraph

if TYPE_CHECKING:
    from kvdock.attach import Dock
    from kvdock.cache import DockCache
    from kvdock.fused import FusedStep
    from kvdock.plan import DockPlan
    from kvdock.session import Session

ROOM = 256
"""Most slots a row gets ahead for new tokens; when they are full the layers grow by as many."""
WORTHWHILE = 16
"""Fewest decode steps for which graph="auto" captures: the capture costs a few eager steps."""
LONGEST = 16_384
"""Most slots a layer may hold for graph="auto" to capture where attention over slots is masked.

That is where the Triton kernel cannot run. Torch's masked kernel reads a long cache several times
slower than its plain one: on an H100, one row, 51 against 13 µs a layer at 4K slots and 372 against
51 µs at 32K (`benchmarks/results/storage-h100`).
"""
VERIFIED = ("llama", "mistral", "qwen2", "qwen3", "glm4")
"""Model types whose forward takes nothing from the host that changes from step to step."""

STEP_INPUTS = ("input_ids", "position_ids", "cache_position")

_log = logging.getLogger("kvdock")


@dataclass
class DecodeMode:
    """Say how the decode steps of one attachment run.

    Args:
        capture: replay a graph; otherwise run the fixed shapes kernel by kernel.
        required: raise instead of decoding eagerly.
    """

    capture: bool
    required: bool = False
    told: bool = False

    def fall_back(self, reason: str) -> None:
        """Say once why decode runs eagerly, or raise where a graph was asked for."""
        if self.required:
            raise UnsupportedError(
                f"graph=True: decode cannot be captured, because {reason}. Use graph='auto', which"
                " then decodes eagerly."
            )
        if not self.told:
            self.told = True
            _log.warning("decode runs eagerly, without a CUDA graph: %s", reason)


def choose_mode(model: Any, plan: DockPlan, graph: str | bool) -> DecodeMode | None:
    """Return how to decode, or None for eager decode in shapes that grow."""
    if graph not in ("auto", True, False):
        raise UnsupportedError(f"graph is {graph!r}; expected 'auto', True or False.")
    if graph is False:
        return None
    layout_only = graph == "auto" and os.environ.get("KVDOCK_FROZEN") == "1"
    mode = DecodeMode(capture=not layout_only, required=graph is True)
    reason = _obstacle(model, plan, mode.capture)
    if reason is None:
        return mode
    if model.device.type == "cuda" or mode.required:
        mode.fall_back(reason)
    else:
        _log.info("decode runs eagerly, without a CUDA graph: %s", reason)
    return None


def _obstacle(model: Any, plan: DockPlan, capture: bool) -> str | None:
    """Return what keeps this attachment from decoding in fixed shapes, or None."""
    methods = "+".join(plan.methods)
    if capture and model.device.type != "cuda":
        return f"the model is on {model.device.type!r}, and graphs need a CUDA device"
    if plan.storage_policy is not None and not plan.storage_policy.fixed_steps:
        return f"the storage of {methods} decides on the host when it packs entries"
    if len(plan.managed) != plan.config.num_hidden_layers:
        return "some of the model's layers keep a cache of their own (sliding window or linear)"
    if plan.facts.shard.kv_heads is not None:
        return "it is split over processes, which would have to capture in step"
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or hasattr(model, "_hf_hook"):
        return f"the model is spread over devices ({', '.join(sorted(devices))}) or offloaded"
    if plan.config.model_type not in VERIFIED:
        return (
            f"model type {plan.config.model_type!r} is not among those whose forward is known to"
            f" be the same at every step ({', '.join(VERIFIED)})"
        )
    return None


class Decoder:
    """Lead the decode steps of one `generate()` call; it knows the cache only while it steps.

    Args:
        steps: decode steps the call will make at most, where that is known.
    """

    def __init__(self, mode: DecodeMode, steps: int | None) -> None:
        self.frozen: FrozenCache | None = None
        self.stepping = False
        """Whether a forward runs on the frozen layers right now."""
        self._mode = mode
        self._steps_left = steps
        self._graph: StepGraph | None = None
        self._fused: FusedStep | None = None
        self._capturing = mode.capture

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Leave a copied cache without a decoder: a graph works on the memory it was made for."""

    def step(
        self,
        cache: DockCache,
        forward: Callable[..., Any],
        given: dict[str, Any],
        fuse: Callable[[], FusedStep | None] = lambda: None,
    ) -> Any:
        """Run the model's forward of one new column per row.

        Args:
            fuse: returns what makes the step's small operations fewer while it is captured.
        """
        session = cache.session
        if self.frozen is None and self._too_long(session):
            session.decoder = None
            return forward(**given)
        if self.frozen is None or self.frozen.room == 0:
            self._graph = None  # it reads and writes the slots that are replaced now
            room = ROOM if self._steps_left is None else max(1, min(ROOM, self._steps_left))
            if self.frozen is not None:
                self.frozen.thaw()
            self.frozen = FrozenCache(session.stores, room)
            self._fused = fuse() if self._capturing else None
            if self._fused is not None:  # trials wait for the device, which a warm-up must not
                self._fused.products.prepare(given["input_ids"].shape[0])
        frozen = self.frozen
        # every column of a step is real, so the forward needs no mask
        call = {name: value for name, value in given.items() if name != "attention_mask"}

        def run(inputs: dict[str, Any]) -> Any:
            self.stepping = True
            fused = self._fused if self._capturing else None
            try:
                frozen.begin()
                with nullcontext() if fused is None else fused.active():
                    output = forward(**{**call, **inputs})
                frozen.end()
            finally:
                self.stepping = False
            return output

        output = self._captured(run, call) if self._capturing else run({})
        frozen.advance()
        if self._steps_left is not None:
            self._steps_left -= 1
        return output

    def _too_long(self, session: Session) -> bool:
        """Say whether eager decode reads this cache faster, and tell the user why."""
        if not self._mode.capture or self._mode.required:
            return False
        if session.plan.storage_policy is not None:
            return False  # a storage of its own does not attend through a mask
        slots = max(max(store.storage.live) for store in session.stores)
        if slots <= LONGEST or all(has_kernel(store) for store in session.stores):
            return False
        self._mode.fall_back(
            f"a layer holds {slots} entries, over {LONGEST} of which eager attention is faster than"
            " the masked one that a graph needs without Triton"
        )
        return True

    def _captured(self, run: Callable[[dict[str, Any]], Any], call: dict[str, Any]) -> Any:
        """Run the first step of a shape as it is, capture the second, replay from then on."""
        inputs = {name: call[name] for name in STEP_INPUTS if call.get(name) is not None}
        rest = {name: value for name, value in call.items() if name not in inputs}
        if self._graph is not None and not self._graph.fits(inputs, rest):
            self._graph = None
        if self._graph is None:
            self._graph = StepGraph(inputs, rest)
        try:
            return self._graph.step(run, inputs, rest)
        except CaptureError as error:
            # nothing ran while the capture failed, so the step is still to be made
            self._capturing, self._graph = False, None
            self._mode.fall_back(str(error))
            return run({})

    def release(self) -> None:
        """Drop the graph with its memory and give the layers back to eager decode."""
        self._graph = None
        if self.frozen is not None:
            self.frozen.thaw()
            self.frozen = None


def make_decoder(mode: DecodeMode | None, settings: dict[str, Any]) -> Decoder | None:
    """Return what leads the decode of a `generate()` call; None where it runs eagerly.

    Args:
        settings: "steps" (None if unknown), "num_beams" and "custom_generate" of the call.
    """
    if mode is None:
        return None
    if (settings["num_beams"] or 1) > 1:
        mode.fall_back("beam search reorders the rows between steps")
        return None
    if settings["custom_generate"]:
        mode.fall_back("custom_generate has a loop of its own")
        return None
    steps = settings["steps"]
    short = steps is not None and steps < WORTHWHILE
    if mode.capture and short and not mode.required:
        return None
    return Decoder(mode, steps)


def docked_forward(dock: Dock, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `forward` that hands the steps of the dock's `generate()` to its decoder."""
    from kvdock.cache import DockCache

    @functools.cache
    def fuse() -> FusedStep | None:
        from kvdock.fused import fused_step

        return fused_step(dock.model)

    @functools.wraps(original)  # generate() asks for the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if not args and isinstance(cache, DockCache) and cache.plan is dock.plan:
            decoder = cache.session.decoder
            if decoder is not None and _is_step(cache.session, kwargs):
                return decoder.step(cache, original, kwargs, fuse)
        return original(*args, **kwargs)

    return forward


def _is_step(session: Session, given: dict[str, Any]) -> bool:
    """Say whether a forward brings one new column after the prompt, and nothing unusual."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    if not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
        return False
    if ids.dim() != 2 or ids.shape[1] != 1 or not given.get("return_dict"):
        return False
    if session.prompt_columns is None or session.columns < session.prompt_columns:
        return False
    if any(store.open or store.storage.empty for store in session.stores):
        return False
    unusual = [
        name
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and name not in (*STEP_INPUTS, "attention_mask")
    ]
    return not unusual and given.get("labels") is None
