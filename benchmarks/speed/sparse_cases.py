"""Inputs of the sparse-prefill measurements: one layer of Llama-3.1-8B's shape, and block lists.

Queries, keys and values lie in memory as a model leaves them, [1, T, heads, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdock.kernels.blocks import BLOCK, BlockGrid, BlockLists, lists_from_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALING = HEAD_DIM**-0.5
HEAVY_EVERY = 512


@dataclass(frozen=True, slots=True)
class Planted:
    """Say how a layer is planted.

    Args:
        sharpness: by which queries are scaled.
        shared: length of the direction that queries and keys share; noise has √D.
        heavy, sink: lengths of what heavy keys, and the first key, get along the mean query.
    """

    sharpness: float
    shared: float = 14.0
    heavy: float = 4.0
    sink: float = 10.0


PLANTED = {
    "diffuse": Planted(0.85),
    "sharp": Planted(1.0),
    "noisy": Planted(2.0, shared=9.0, heavy=8.0, sink=16.0),
}
"""Of the first two the published selection lists about as many blocks, at as small an error, as of
the data it was timed on; see `sparse_planted.py`. The third hides more of its mass in heavy keys.
"""


def states(
    queries: int,
    keys: int,
    *,
    rows: int = 1,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random query [b, H, Q, D], key and value [b, K, N, D]."""

    def make(heads: int, length: int) -> Tensor:
        shape = (rows, length, heads, head_dim)
        return torch.randn(shape, device=DEVICE, dtype=dtype).transpose(1, 2)

    return make(heads, queries), make(kv_heads, keys), make(kv_heads, keys)


def random_lists(
    queries: int, keys: int, density: float, *, rows: int = 1, heads: int = HEADS
) -> BlockLists:
    """Return lists with block 0, the diagonal, and random blocks up to ``density``."""
    grid = BlockGrid(queries, keys, BLOCK)
    row = torch.arange(grid.rows, device=DEVICE)[:, None] + grid.first
    column = torch.arange(grid.key_blocks, device=DEVICE)
    forced = (column == 0) | (column == row)
    needed = int((forced & (column <= row)).sum())
    free = max(grid.causal_blocks - needed, 1)
    share = min(max((density * grid.causal_blocks - needed) / free, 0.0), 1.0)
    shape = (rows, heads, grid.rows, grid.key_blocks)
    mask = torch.rand(shape, device=DEVICE) < share
    return lists_from_mask((mask | forced) & (column <= row), BLOCK)


def planted(
    length: int, data: Planted, *, heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer with structure: locality, a sink, and one heavy key in 512.

    Queries and keys share a direction, plus noise, and are turned by RoPE, which makes near keys
    score higher. The first key and every heavy key are added to along the directions of the
    queries that meet them.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    shared = noise(kv_heads, 1, HEAD_DIM)
    shared = data.shared * shared / shared.norm(dim=-1, keepdim=True)
    query = noise(kv_heads, heads // kv_heads, length, HEAD_DIM) + shared[:, None]
    query = _turn(query).mul_(data.sharpness)
    key = _turn(noise(kv_heads, length, HEAD_DIM) + shared)
    value = noise(kv_heads, length, HEAD_DIM)
    mean = query[:, :, length // 2 :].mean((1, 2))
    mean = mean / mean.norm(dim=-1, keepdim=True)
    count = (length // HEAVY_EVERY,)
    heavy = torch.randint(0, HEAVY_EVERY, count, device=DEVICE, generator=generator)
    heavy += HEAVY_EVERY * torch.arange(length // HEAVY_EVERY, device=DEVICE)
    key[:, heavy] += data.heavy * mean[:, None]
    key[:, 0] += data.sink * mean
    return tuple(_as_model(x) for x in (query.flatten(0, 1), key, value))  # type: ignore[return-value]


def _turn(states: Tensor, theta: float = 500_000.0) -> Tensor:
    """Apply RoPE to [..., T, D]."""
    half = states.shape[-1] // 2
    rate = theta ** (-torch.arange(half, device=states.device) / half)
    angle = torch.arange(states.shape[-2], device=states.device)[:, None] * rate
    first, second = states[..., :half], states[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _as_model(states: Tensor) -> Tensor:
    """Turn float32 [heads, T, D] into bfloat16 [1, heads, T, D] over memory [1, T, heads, D]."""
    return states.bfloat16().transpose(0, 1).contiguous().transpose(0, 1)[None]
