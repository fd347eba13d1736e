"""Block lists from a mask of blocks in one pass over it, in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Blocks of keys a program looks at together."""


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return count, int32 [b, H, M], and index, int32 [b, H, M, Nk], of bool [b, H, M, Nk]."""
    bits = mask.contiguous().view(torch.uint8)
    width = mask.shape[-1]
    count = torch.empty(mask.shape[:-1], dtype=torch.int32, device=mask.device)
    index = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    if not mask.numel():
        return count.zero_(), index
    chunk = min(CHUNK, triton.next_power_of_2(width))
    with torch.cuda.device_of(mask):
        _compact[(count.numel(),)](bits, count, index, width, CHUNK=chunk, num_warps=4)
    return count, index


@triton.jit
def _compact(bits, count, index, width, CHUNK: tl.constexpr):
    """Write the columns of one row's set bits, ascending, and how many there are."""
    row = tl.program_id(0)
    base = tl.cast(row, tl.int64) * width
    column = tl.arange(0, CHUNK)
    found = row * 0
    for start in range(0, width, CHUNK):
        inside = start + column < width
        bit = tl.load(bits + base + start + column, mask=inside, other=0).to(tl.int32)
        place = found + tl.cumsum(bit, 0) - 1
        tl.store(index + base + place, start + column, mask=bit > 0)
        found += tl.sum(bit, 0)
    tl.store(count + row, found)
