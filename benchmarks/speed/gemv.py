"""Products of a few rows with a weight matrix, in Triton: candidates beside cuBLAS.

Shapes: M rows (1 … 32), N outputs, K inputs; weights are [N, K] as `nn.Linear` holds them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """Say how a program is cut: outputs and inputs of a tile, warps, pipeline depth.

    Args:
        dot: multiply on the tensor cores, M padded to 16 or 32; else in float32 lanes, M = 1 only.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int
    dot: bool

    def __str__(self) -> str:
        kind = "dot" if self.dot else "fma"
        return f"{kind} {self.outputs}x{self.inputs} w{self.warps} s{self.stages}"


FMA = [
    Cut(4, 1024, 4, 1, False), Cut(8, 512, 4, 1, False), Cut(8, 1024, 8, 1, False),
    Cut(16, 256, 4, 1, False), Cut(16, 512, 8, 1, False), Cut(2, 2048, 4, 1, False),
    Cut(4, 512, 2, 1, False),
]  # fmt: skip
DOT = [
    Cut(16, 128, 2, 5, True), Cut(16, 256, 2, 4, True), Cut(16, 256, 4, 4, True),
    Cut(16, 512, 4, 3, True), Cut(32, 128, 4, 5, True), Cut(32, 256, 4, 4, True),
    Cut(64, 128, 4, 5, True),
]  # fmt: skip


def linear(states: Tensor, weight: Tensor, cut: Cut) -> Tensor:
    """Return states [M, K] times weight [N, K] transposed, accumulated in float32."""
    rows, inputs = states.shape
    outputs = weight.shape[0]
    out = states.new_empty(rows, outputs)
    grid = (triton.cdiv(outputs, cut.outputs),)
    sizes = {"N": cut.outputs, "K": cut.inputs, "num_warps": cut.warps, "num_stages": cut.stages}
    if cut.dot:
        _dot[grid](states, weight, out, rows, outputs, inputs,
                   M=max(16, triton.next_power_of_2(rows)), STAGES=cut.stages, **sizes)  # fmt: skip
    else:
        _fma[grid](states, weight, out, outputs, inputs, **sizes)
    return out


@triton.jit
def _fma(states, weight, out, outputs, inputs, N: tl.constexpr, K: tl.constexpr):
    n = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    acc = tl.zeros([N, K], tl.float32)
    for start in range(0, inputs, K):
        at = weight + n[:, None] * inputs + (start + k)[None, :]
        there = (n < outputs)[:, None] & (start + k < inputs)[None, :]
        w = tl.load(at, mask=there, other=0.0, eviction_policy="evict_first")
        x = tl.load(states + start + k, mask=start + k < inputs, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    tl.store(out + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=n < outputs)


@triton.jit
def _dot(
    states, weight, out, rows, outputs, inputs,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    m, k = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for start in tl.range(0, inputs, K, num_stages=STAGES):
        inside = start + k < inputs
        w = tl.load(
            weight + n[None, :] * inputs + (start + k)[:, None],
            mask=(n < outputs)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        x = tl.load(
            states + m[:, None] * inputs + (start + k)[None, :],
            mask=(m < rows)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, w, acc)
    writes = (m < rows)[:, None] & (n < outputs)[None, :]
    at = out + m[:, None] * outputs + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=writes)


def compile_one(job: tuple[Cut, int]) -> str:
    """Compile one cut for one number of rows into Triton's cache; return the error, if any."""
    cut, rows = job
    states = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    try:
        found = linear(states, weight, cut).float()
        error = (found - states.float() @ weight.float().T).abs().max().item()
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return "" if error < 2.0 else f"off by {error}"
