"""The merge of partial attentions as one Triton kernel; `split_kv.merge_splits` calls it.

Shapes: n leading dimensions in one, S splits, R query rows, D head_dim of the values.
"""

# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor


def merge_splits(output: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge float32 [..., S, R, D] by natural log-sum-exps [..., S, R]."""
    *lead, splits, rows, dim = output.shape
    output, lse = output.contiguous(), lse.contiguous()
    # the interpreter's NumPy knows no bfloat16
    interpreted = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    stored = torch.float32 if interpreted else dtype
    merged = torch.empty(*lead, rows, dim, dtype=stored, device=output.device)
    total = torch.empty(*lead, rows, dtype=torch.float32, device=output.device)
    block = min(64, max(16, triton.next_power_of_2(dim)))
    grid = (total.numel(), triton.cdiv(dim, block))
    if grid[0]:
        with torch.cuda.device_of(output):
            _merge[grid](
                output, lse, merged, total, splits, rows, dim,
                SPLITS=triton.next_power_of_2(splits), BLOCK=block, num_warps=4,
            )  # fmt: skip
    return merged.to(dtype), total


@triton.jit(do_not_specialize=["splits"])
def _merge(
    output, lse, merged, total, splits, rows, dim,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge one query row's splits for one block of channels."""
    pair = tl.program_id(0).to(tl.int64)
    lead, row = pair // rows, pair % rows
    s, d = tl.arange(0, SPLITS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = (lead * splits + s) * rows + row
    level = tl.load(lse + index, mask=s < splits, other=float("-inf"))
    top = tl.max(level, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(level - top)
    mass = tl.sum(weight, 0)
    read = (weight > 0)[:, None] & (d < dim)[None, :]
    part = tl.load(output + index[:, None] * dim + d[None, :], mask=read, other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(merged + pair * dim + d, mean.to(merged.dtype.element_ty), mask=d < dim)
    if tl.program_id(1) == 0:
        tl.store(total + pair, tl.where(mass > 0, top + tl.log(mass), float("-inf")))
