"""Memory of a method on a model before either runs, from the method's own formulas.

The cache is what `Dock.report` holds a method to. The peak of a prompt is that, the weights, and
what a decoder's forward keeps alive at once, counted in numbers per token (h hidden size, q and k,
v the widths of one layer's queries, keys and values, m the MLP's): in attention, while queries are
rotated, 3h + 4q + k + v; in the MLP 4h + 3m. Long prompts run their MLPs in slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvdock.compose import Composition
from kvdock.footprint import Footprint, LayerShape
from kvdock.kernels.reference import ReferenceBackend
from kvdock.ledger import Ledger
from kvdock.plan import DockPlan
from kvdock.slicing import SLICE
from kvdock.storage_policy import StoreShape

SLICE_ABOVE = 16384
"""The default of `attach`."""
LONGEST = 2**24
"""Where the search for the longest prompt ends."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one method on one model, for prompts of equal length without padding.

    Args:
        composition: None is the plain model with transformers' own cache.
    """

    model: Footprint
    composition: Composition | None
    rows: int = 1

    def cache(self, tokens: int) -> int:
        """Return the bytes of keys and values right after prompts of ``tokens`` tokens."""
        others = sum(_held(shape, tokens) * self._entry(shape) for shape in self.model.others)
        if self.composition is None:
            return others + tokens * sum(map(self._entry, self.model.managed))
        return others + self._managed(tokens)

    def peak(self, tokens: int) -> int:
        """Return about the most bytes that are held at once while such prompts come in."""
        return self.model.weights + self.cache(tokens) + self._forward(tokens)

    def longest(self, memory: int) -> int:
        """Return the longest prompts whose peak fits into ``memory`` bytes, 0 if none does.

        At most what the model is made for.
        """
        low, high = 0, self.model.longest or LONGEST
        if self.peak(high) <= memory:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= memory else (low, middle)
        return low

    def _entry(self, shape: LayerShape) -> int:
        return shape.entry(self.model.dtype) * self.rows

    def _managed(self, tokens: int) -> int:
        assert self.composition is not None
        plan = _plan(self.model, self.composition)
        total = 0
        for rank, layer in enumerate(self.model.managed):
            slot_bytes = self._entry(layer) * len(self.model.managed)
            ledger = Ledger(plan.cache_policy)
            ledger.slots = [plan.layer_slots(tokens, slot_bytes)[rank]]
            ledger.compressed([tokens])
            shape = self._shape(layer, plan)
            storage = plan.storage_policy
            if storage is None:
                total += shape.dense_entry * ledger.capacity
            else:
                total += storage.predicted_nbytes(shape, ledger.capacity)
        return total

    def _shape(self, layer: LayerShape, plan: DockPlan) -> StoreShape:
        channels = plan.channel_policy
        return StoreShape(
            self.rows,
            layer.kv_heads,
            layer.key_dim,
            layer.value_dim,
            self.model.dtype,
            torch.device("meta"),
            None if channels is None else channels.kept_channels(layer.key_dim),
            plan.cache_policy is None,
        )

    def _forward(self, tokens: int) -> int:
        model = self.model
        states = max(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in model.managed)
        attention = tokens * (3 * model.hidden + 4 * model.queries + states)
        if self.composition is None or tokens <= SLICE_ABOVE:
            mlp = tokens * (4 * model.hidden + 3 * model.inner)
        else:
            mlp = tokens * 5 * model.hidden + SLICE * 3 * model.inner
        return max(attention, mlp) * self.rows * model.dtype.itemsize


def bind(model: Footprint, composition: Composition) -> None:
    """Let the policies check that the model fits; raise what `attach` would."""
    if composition.cache_policy is not None:
        composition.cache_policy.bind(model.facts)
    for storage in (composition.channel_policy, composition.format_policy):
        if storage is not None:
            storage.bind(model.facts)
    if composition.attention_policy is not None:
        composition.attention_policy.bind(model.facts, None)


def _held(shape: LayerShape, tokens: int) -> int:
    return tokens if shape.window is None else min(tokens, shape.window - 1)


def _plan(model: Footprint, composition: Composition) -> DockPlan:
    return DockPlan(
        methods=composition.names,
        cache_policy=composition.cache_policy,
        attention_policy=composition.attention_policy,
        channel_policy=composition.channel_policy,
        format_policy=composition.format_policy,
        budget=composition.budget,
        backend=ReferenceBackend(),
        fallback=ReferenceBackend(),
        facts=model.facts,
        config=model.facts.config,
        managed=tuple(range(len(model.managed))),
    )
