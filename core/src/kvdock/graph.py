"""One decode step as a CUDA graph: fixed input buffers, one warm-up step, one capture, replays."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvdock.compat import CACHE

Run = Callable[[dict[str, Any]], Any]
"""Run the step's forward with these inputs in place of the given ones."""


class CaptureError(Exception):
    """A step could not be captured; nothing was run."""


class StepGraph:
    """Replay one decode step of unchanging shapes.

    The first step runs as it is, on the stream of the capture, which loads kernels and makes
    libraries allocate their work space; it also tells whether anything in it waits for the device.
    The second is captured, which runs nothing, and replayed at once.

    Args:
        inputs: what changes from step to step: tensors of fixed shape.
        rest: everything else the forward is given; the same at every step.
    """

    def __init__(self, inputs: dict[str, Tensor], rest: dict[str, Any]) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._rest = _constants(rest)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made: Callable[[Any], Any] | None = None
        self._warm = False
        self._obstacle: str | None = None

    def fits(self, inputs: dict[str, Tensor], rest: dict[str, Any]) -> bool:
        """Say whether a step is of the shape this graph was made for."""
        known = {name: (tensor.shape, tensor.dtype) for name, tensor in self._inputs.items()}
        asked = {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
        return known == asked and self._rest == _constants(rest)

    def step(self, run: Run, inputs: dict[str, Tensor], rest: dict[str, Any]) -> Any:
        """Run one step; raise ``CaptureError`` before anything ran where it cannot be captured."""
        if not self._warm:
            return self._warm_up(run)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        if self._graph is None:
            self._capture(run)
        assert self._graph is not None and self._made is not None
        self._graph.replay()
        return self._made(rest)

    def _warm_up(self, run: Run) -> Any:
        """Run the step itself, its inputs not moved, and note where the host waits for it."""
        self._warm = True
        device = next(iter(self._inputs.values())).device
        stream, current = side_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), SyncWatch() as watch:
            output = run(self._inputs)
        current.wait_stream(stream)
        self._obstacle = watch.found
        return output

    def _capture(self, run: Run) -> None:
        if self._obstacle is not None:
            raise CaptureError(self._obstacle)
        device = next(iter(self._inputs.values())).device
        stream, current = side_stream(device), torch.cuda.current_stream(device)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        collecting = gc.isenabled()
        gc.disable()  # what it would free may belong to another graph, which is not allowed now
        try:
            # a broken capture also warns (of an empty graph, of lost memory); its error says it all
            with torch.cuda.stream(stream), _warnings_of_success():
                # other threads (a streamer's, a server's) may go on using the device
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    output = run(self._inputs)
                finally:
                    graph.capture_end()
        except Exception as error:
            _repair_generator(device)
            line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            raise CaptureError(f"the capture failed ({type(error).__name__}: {line})") from error
        finally:
            if collecting:
                gc.enable()
            current.wait_stream(stream)
        self._graph, self._made = graph, _remake(output)


class SyncWatch:
    """Note the first place inside the block where the host waits for the device."""

    found: str | None = None

    def __enter__(self) -> SyncWatch:
        self._mode = torch.cuda.get_sync_debug_mode()
        self._catching = warnings.catch_warnings(record=True)
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode(self._mode)
        self._catching.__exit__(None, None, None)
        for item in self._caught or []:
            if "synchronizing CUDA operation" in str(item.message):
                self.found = self.found or f"{item.filename}:{item.lineno} waits for the device"


@contextmanager
def _warnings_of_success() -> Iterator[None]:
    """Show the warnings of a block only where it succeeds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for item in caught or []:
        warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures; libraries keep a work space per stream for good."""
    return torch.cuda.Stream(device)


def _constants(rest: dict[str, Any]) -> dict[str, Any]:
    """Return what has to stay the same; the cache is told by its type, so as not to be held."""
    return {
        name: value
        if value is None or isinstance(value, bool | int | float | str)
        else type(value).__name__
        for name, value in rest.items()
    }


def _remake(output: Any) -> Callable[[Any], Any]:
    """Return a function that makes an output of the captured kind from the graph's memory.

    Tensors are copied, since the next replay overwrites them; the cache is the caller's.
    """
    kind = type(output)
    held = {name: value for name, value in output.items() if name != CACHE}

    def made(rest: dict[str, Any]) -> Any:
        fresh = {name: _copied(value) for name, value in held.items()}
        if CACHE in output_names:
            fresh[CACHE] = rest[CACHE]
        return kind(**fresh)

    output_names = frozenset(output.keys())
    return made


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    return value


def _repair_generator(device: torch.device) -> None:
    """Give the device's random numbers a state that no broken capture is waiting for."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
