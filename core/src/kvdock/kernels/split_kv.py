"""Share the entries of a long row among programs, and merge their partial attentions.

Shapes: S splits, R query rows of one key/value head, D head_dim of the values.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

SETUP_TILES = 2.0
"""Start, first loads and last store of a program, in the time of one tile."""
MERGE_TILES = 0.05
"""What one more partial result costs the merge, in the time of one tile."""


def split_count(
    rows: int,
    multiprocessors: int,
    tokens: int,
    *,
    tile: int = 64,
    resident: int = 2,
    most: int = 128,
) -> int:
    """Return the number of programs that share a row's tokens and finish the whole grid first.

    Programs run in waves of ``multiprocessors · resident``. The count minimises waves × (tiles of
    one program + its set-up) + the merge; the smallest such count is taken.

    Args:
        rows: programs the grid has without splitting (batch × key/value heads × query blocks).
        tokens: entries of the longest row.
        tile: entries a program takes at a time.
        resident: programs that run on one multiprocessor at the same time.
    """
    tiles = max(1, -(-tokens // tile))
    return _best_split(max(1, rows), max(1, multiprocessors * resident), tiles, most)


@lru_cache(maxsize=4096)
def _best_split(rows: int, slots: int, tiles: int, most: int) -> int:
    def cost(splits: int) -> float:
        waves = -(-rows * splits // slots)
        return waves * (-(-tiles // splits) + SETUP_TILES) + splits * MERGE_TILES

    return min(range(1, min(tiles, most) + 1), key=cost)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for any other device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def merge_splits(
    output: Tensor, lse: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Merge partial attentions by their log-sum-exps, in one kernel on a GPU that has Triton.

    A split with the log-sum-exp −inf took part in nothing: its output is not read and may be
    uninitialised. Where all splits are so, the output is 0 and the log-sum-exp −inf.

    Args:
        output: float32 [..., S, R, D], normalised within each split.
        lse: natural log-sum-exp of each split, float32 [..., S, R].
        dtype: of the merged output.

    Returns:
        ([..., R, D] in ``dtype``, float32 [..., R]), contiguous.
    """
    kernels = _kernels() if output.is_cuda else None
    if kernels is not None:
        merged: tuple[Tensor, Tensor] = kernels.merge_splits(output, lse, dtype)
        return merged
    return reference_merge(output, lse, dtype)


def reference_merge(
    output: Tensor, lse: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute `merge_splits` in plain torch."""
    total = lse.logsumexp(dim=-2)
    weight = (lse - total.nan_to_num(neginf=0.0)[..., None, :]).exp()[..., None]
    merged = (output * weight).where(weight > 0, 0.0).sum(dim=-3)
    return merged.to(dtype), total


@cache
def _kernels() -> ModuleType | None:
    """Return the Triton kernel's module, or None where Triton cannot be imported."""
    try:
        from kvdock.kernels import split_kv_triton
    except Exception:  # not installed, or broken: plain torch does the same
        return None
    return split_kv_triton
