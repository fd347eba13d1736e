"""Run linear layers of one input as one kernel in a captured step, where it is right and faster.

A group of layers is taken by its shapes, for one number of rows, after two trials before the
capture: the kernel has to give what the layers give, and a graph over all of the model's layers has
to run faster with it. Layers that are more than a plain weight (a hook, an adapter, a quantised or
sharded weight, a forward of somebody else's) always run themselves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from kvdock.graph import side_stream

MOST_ROWS = 8
UNITS = 4
"""Units in the last place of the largest value by which a product may differ; both round once."""
GAIN = 0.95
"""Share of the layers' own time that the kernel may take, so that noise decides nothing."""
REPLAYS = 4

_log = logging.getLogger("kvdock")
_verdicts: dict[Kind, bool] = {}


class Kind(NamedTuple):
    """Name what a trial holds for."""

    shapes: tuple[tuple[int, ...], ...]
    biased: bool
    gated: bool
    rows: int
    dtype: torch.dtype
    device: torch.device


class Products:
    """Hold a model's groups of layers and say which run as one kernel.

    Args:
        kernels: the modules `kernels.products_triton` and `kernels.step_triton`; None for neither.
        device: the type of the devices that they run on.
        clock: returns the time of a call; the device's time of a replayed graph by default.
    """

    def __init__(
        self,
        kernels: tuple[ModuleType, ModuleType] | None,
        device: str = "cuda",
        clock: Callable[[Callable[[], Any]], float] | None = None,
    ) -> None:
        self._kernels = kernels
        self._device = device
        self._clock = clock or replayed
        self._groups: list[tuple[tuple[nn.Module, ...], bool]] = []
        self._taken: set[Kind] = set()

    def add(self, layers: Sequence[nn.Module], *, gated: bool = False) -> None:
        """Note a group that a fused module will ask for."""
        if self._kernels is not None:
            self._groups.append((tuple(layers), gated))

    @torch.no_grad()
    def prepare(self, rows: int) -> None:
        """Try the groups that have not been tried at this many rows; not inside a capture."""
        alike: dict[Kind, list[tuple[nn.Module, ...]]] = {}
        for layers, gated in self._groups:
            if rows <= MOST_ROWS and (kind := self._kind(layers, gated, rows)) is not None:
                alike.setdefault(kind, []).append(layers)
        for kind, groups in alike.items():
            if kind not in _verdicts:
                _verdicts[kind] = self._tried(kind, groups)
        self._taken = {kind for kind in alike if _verdicts[kind]}

    def __call__(self, layers: Sequence[nn.Module], states: Tensor) -> list[Tensor]:
        """Apply all layers to the same states [..., K]."""
        if self._takes(layers, states, gated=False):
            return self._product(layers, states)
        return [layer(states) for layer in layers]

    def gated(self, layers: Sequence[nn.Module], states: Tensor) -> Tensor | None:
        """Return SiLU(gate) · up of two layers or of one that holds both; None if not taken."""
        if self._takes(layers, states, gated=True):
            return self._gated_product(layers, states)
        return None

    def _takes(self, layers: Sequence[nn.Module], states: Tensor, *, gated: bool) -> bool:
        if not self._taken:
            return False
        rows = states.numel() // states.shape[-1]
        kind = self._kind(layers, gated, rows)
        return kind in self._taken and states.dtype == kind.dtype and states.device == kind.device

    def _kind(self, layers: Sequence[nn.Module], gated: bool, rows: int) -> Kind | None:
        """Return what these layers are, or None where one is more than a plain weight."""
        if not all(map(plain, layers)):
            return None
        weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
        first, biases = weights[0], [layer.bias is not None for layer in layers]
        alike = {(w.dtype, w.device, w.shape[1]) for w in weights}
        if len(alike) > 1 or len(set(biases)) > 1 or first.device.type != self._device:
            return None
        if first.dtype not in (torch.float16, torch.bfloat16):
            return None  # float32 stays the layers' own to the bit
        shapes = tuple(tuple(w.shape) for w in weights)
        return Kind(shapes, biases[0], gated, rows, first.dtype, first.device)

    def _product(self, layers: Sequence[Any], states: Tensor) -> list[Tensor]:
        assert self._kernels is not None
        weights, biases = [x.weight for x in layers], [x.bias for x in layers]
        made: list[Tensor] = self._kernels[0].products(states, weights, biases)
        return made

    def _gated_product(self, layers: Sequence[Any], states: Tensor) -> Tensor:
        assert self._kernels is not None
        weights, biases = [x.weight for x in layers], [x.bias for x in layers]
        if len(layers) == 1:  # gate and up are the halves of one weight
            weights = list(weights[0].chunk(2))
            biases = [None, None] if biases[0] is None else list(biases[0].chunk(2))
        made: Tensor = self._kernels[0].gated_product(states, weights, biases)
        return made

    def _own(self, layers: Sequence[nn.Module], states: Tensor, gated: bool) -> list[Tensor]:
        """Return what a step computes without the kernel."""
        made = [layer(states) for layer in layers]
        if not gated:
            return made
        assert self._kernels is not None
        gate, up = made if len(made) == 2 else made[0].chunk(2, dim=-1)
        return [self._kernels[1].gated(gate, up)]

    def _one(self, layers: Sequence[nn.Module], states: Tensor, gated: bool) -> list[Tensor]:
        return [self._gated_product(layers, states)] if gated else self._product(layers, states)

    def _tried(self, kind: Kind, groups: list[tuple[nn.Module, ...]]) -> bool:
        """Say whether the kernel gives what the layers give, in less time; log why not."""
        shapes = " + ".join("x".join(map(str, shape)) for shape in kind.shapes)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(kind.rows, 1, kind.shapes[0][1], generator=generator)
        states = drawn.to(kind.device, kind.dtype)
        try:
            wanted = self._own(groups[0], states, kind.gated)
            found = self._one(groups[0], states, kind.gated)
            off = max(_off(*pair) for pair in zip(found, wanted, strict=True))
            if not off <= UNITS:
                reason = f"differs by {off:.1f} units in the last place"
            else:
                own = self._clock(lambda: [self._own(g, states, kind.gated) for g in groups])
                one = self._clock(lambda: [self._one(g, states, kind.gated) for g in groups])
                if one < GAIN * own:
                    return True
                reason = f"takes {one:.3f} ms where the layers take {own:.3f}"
        except Exception as error:  # no compiler, or not for this chip
            reason = f"{type(error).__name__}: {error}"
        _log.info("%s at %d rows runs by its own layers: one kernel %s", shapes, kind.rows, reason)
        return False


def plain(layer: nn.Module) -> bool:
    """Say whether a layer is a weight and nothing else."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    if type(layer.weight) is not nn.Parameter or type(layer.weight.data) is not Tensor:
        return False  # quantised and sharded weights are tensors of their own kind
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    everywhere = modules._global_forward_hooks or modules._global_forward_pre_hooks
    return not hooked and not everywhere and layer.weight.is_contiguous()


def _off(found: Tensor, wanted: Tensor) -> float:
    unit = torch.finfo(wanted.dtype).eps * wanted.double().abs().max()
    return float((found.double() - wanted.double()).abs().max() / unit)


def replayed(run: Callable[[], Any]) -> float:
    """Return the milliseconds of a call on the device, the best of a graph's few replays."""
    device = torch.device("cuda", torch.cuda.current_device())
    stream, current = side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize(device)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        times = []
        for _ in range(REPLAYS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    current.wait_stream(stream)
    return float(min(times))


def products_of(device: torch.device) -> Products:
    """Return the products of a model on this device; none where Triton is missing.

    KVDOCK_PRODUCTS=0 leaves every layer to itself, to the bit.
    """
    if device.type != "cuda" or os.environ.get("KVDOCK_PRODUCTS") == "0":
        return Products(None)
    try:
        from kvdock.kernels import products_triton, step_triton
    except Exception:  # not installed, or broken: the layers themselves do the same
        return Products(None)
    return Products((products_triton, step_triton))
