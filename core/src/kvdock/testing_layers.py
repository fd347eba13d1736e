"""Drive layers with random states, as a model's attention would: for tests against an oracle.

Shapes: B rows, H query heads, K key/value heads, T columns, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdock.budget import Budget
from kvdock.kernels.reference import ReferenceBackend
from kvdock.layer import LayerStore
from kvdock.layout import BatchLayout
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, CachePolicy, ModelFacts
from kvdock.rope import Rotate
from kvdock.session import Session

States = tuple[Tensor, Tensor, Tensor]


class LayerDriver:
    """Run prompts and decode steps through the core's layers under one policy, without a model.

    Args:
        rotate: turns cached keys, see `ModelFacts`; a policy that moves keys needs it.
        params: what the model passes to attention; a scale of 1/√D when None.
    """

    def __init__(
        self,
        policy: CachePolicy,
        budget: int | str,
        layers: int = 1,
        *,
        rotate: Rotate | None = None,
        params: AttentionParams | None = None,
    ) -> None:
        facts = ModelFacts(layers, rotate)
        policy.bind(facts)
        policy.check_budget(Budget.parse(budget))
        plan = DockPlan(
            methods=(type(policy).__name__,),
            cache_policy=policy,
            attention_policy=None,
            budget=Budget.parse(budget),
            backend=ReferenceBackend(),
            fallback=ReferenceBackend(),
            facts=facts,
            config=None,
            managed=tuple(range(layers)),
        )
        self.session = Session(plan)
        self._params = params
        self._mask: Tensor | None = None

    def store(self, layer: int = 0) -> LayerStore:
        """Return one layer."""
        return self.session.stores[layer]

    def prompt(
        self,
        *states: States,
        lengths: Sequence[int] | None = None,
        chunks: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Feed a first or later prompt; return every layer's output, [B, T, H, D].

        Args:
            states: q [B, H, T, D], k and v [B, K, T, D] of every layer.
            lengths: real tokens per row, padded on the left; all columns when None.
            chunks: columns per forward; one forward when None.
        """
        batch, _, columns, _ = states[0][0].shape
        first = columns - torch.tensor(lengths or [columns] * batch)
        mask = torch.arange(columns) >= first[:, None]
        seen = 0 if self._mask is None else self._mask.shape[1]
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        self.session.begin_turn(seen + columns)
        pieces, start = [], 0
        for size in chunks or [columns]:
            pieces.append(self._forward(states, slice(start, start + size), seen + start))
            start += size
        return [torch.cat(outputs, dim=1) for outputs in zip(*pieces, strict=True)]

    def step(self, *states: States) -> list[Tensor]:
        """Decode one token per row; ``states`` and outputs are those of `prompt` with T = 1."""
        assert self._mask is not None
        seen = self._mask.shape[1]
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(states, slice(0, 1), seen)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Reorder, repeat or drop rows, as beam search does between steps."""
        assert self._mask is not None
        index = torch.tensor(rows)
        self._mask = self._mask[index]
        for store in self.session.stores:
            store.select_rows(index)

    def _forward(self, states: Sequence[States], part: slice, seen: int) -> list[Tensor]:
        assert self._mask is not None
        columns = part.stop - part.start
        mask = self._mask[:, : seen + columns]
        layout = BatchLayout(mask, mask.shape[0], columns, seen)
        params = self._params or AttentionParams(states[0][0].shape[-1] ** -0.5)
        return [
            self.session.attend(layer, q[:, :, part], k[:, :, part], v[:, :, part], layout, params)
            for layer, (q, k, v) in enumerate(states)
        ]

    def kept(self, layer: int = 0) -> list[list[list[int]]]:
        """Return the kept positions per row and key/value head; empty slots are left out."""
        return [
            [[position for position in head if position >= 0] for head in row]
            for row in self.store(layer).storage.kept_positions().tolist()
        ]


def random_states(
    seed: int, rows: int, kv_heads: int, group: int, columns: int, head_dim: int
) -> States:
    """Return normal q [B, H, T, D], k and v [B, K, T, D], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(rows, heads, columns, head_dim, generator=generator)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    return q, k, v
