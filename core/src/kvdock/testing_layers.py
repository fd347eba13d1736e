"""Drive one layer with random states, as a model's attention would: for tests against an oracle.

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

States = tuple[Tensor, Tensor, Tensor]


def layer_stores(policy: CachePolicy, budget: int | str, layers: int = 1) -> list[LayerStore]:
    """Return the empty stores of a model of ``layers`` layers under one policy."""
    facts = ModelFacts(layers, None)
    policy.bind(facts)
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
    return [LayerStore(plan, rank) for rank in range(layers)]


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


def feed(
    store: LayerStore,
    states: States,
    *,
    lengths: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
    turn: int = 0,
    past: Tensor | None = None,
) -> Tensor:
    """Feed one prompt and return the attention's output, [B, T, H, D].

    Args:
        lengths: real tokens per row, padded on the left; all columns when None.
        chunks: columns per forward; one forward when None.
        past: bool [B, seen], the mask of the columns of earlier turns.
    """
    q, k, v = states
    rows, _, columns, head_dim = q.shape
    first = columns - torch.tensor(lengths or [columns] * rows)
    mask = torch.arange(columns) >= first[:, None]
    seen = 0 if past is None else past.shape[1]
    if past is not None:
        mask = torch.cat([past, mask], dim=1)
    params, start = AttentionParams(head_dim**-0.5), 0
    outputs: list[Tensor] = []
    for size in chunks or [columns]:
        stop = start + size
        layout = BatchLayout(mask[:, : seen + stop], rows, size, seen + start)
        part = slice(start, stop)
        output = store.extend(
            q[:, :, part], k[:, :, part], v[:, :, part], layout, params,
            turn=turn, last=stop == columns, prompt_columns=seen + columns,
        )  # fmt: skip
        outputs.append(output)
        start = stop
    return torch.cat(outputs, dim=1)


def kept(store: LayerStore) -> list[list[list[int]]]:
    """Return the kept positions per row and key/value head; empty slots are left out."""
    return [
        [[position for position in head if position >= 0] for head in row]
        for row in store.storage.kept_positions().tolist()
    ]
