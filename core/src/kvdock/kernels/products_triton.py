"""Products of a step's few rows with weights where they lie, in Triton.

At one token per row a product reads its weight and computes next to nothing. A library starts one
kernel per weight; a small weight (a group's keys or values) then leaves most of the chip idle, and
every start and end costs microseconds without traffic. Here weights of one input are read by one
grid, and the first of them before the preceding kernel is done. Every output is summed by one
program in one order, so results never vary.

Shapes: R rows, N outputs and K inputs of a weight [N, K]. Sums are float32, rounded once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvdock.kernels.overlap import launch, let_next_start, wait_for_previous

MOST_ROWS = 8
"""Rows of the tensor cores' narrowest tile."""
EXACT = {"enable_fp_fusion": False}
LINE = tl.constexpr(64)
"""Elements of 16 bits in a line of the second-level cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Say how a program is cut: outputs and inputs of a tile, warps, pipeline depth.

    Args:
        ahead: inputs of every output that are fetched before the preceding kernel is done; only
            where tensor cores multiply, otherwise it is the first tile.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int = 1
    ahead: int = 0


def products(
    states: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tile: Tile | None = None,
    *,
    lanes: bool | None = None,
    early: bool | None = None,
) -> list[Tensor]:
    """Multiply the same states with up to three weights in one launch.

    Args:
        states: [..., K], up to `MOST_ROWS` rows.
        weights: [N, K] each, contiguous. biases: [N] each, all or none of them.
        lanes: multiply in float32 lanes, one row only, else by tensor cores.
        early: start while the kernel before still runs, where the device can; in lanes by default.

    Returns:
        One [..., N] per weight.
    """
    made = [states.new_empty(*states.shape[:-1], weight.shape[0]) for weight in weights]
    _launch(states, weights, biases, made, False, tile, lanes, early)
    return made


def gated_product(
    states: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tile: Tile | None = None,
    *,
    lanes: bool | None = None,
    early: bool | None = None,
) -> Tensor:
    """Return SiLU(states · gate) · (states · up), rounded where separate operations round.

    Args:
        states: [..., K]. weights: gate and up, [N, K]. biases: theirs, both or none.
    """
    made = states.new_empty(*states.shape[:-1], weights[0].shape[0])
    _launch(states, weights, biases, [made], True, tile, lanes, early)
    return made


def default_tile(rows: int, inputs: int, *, gated: bool) -> Tile:
    """Return how to cut a product of this many rows."""
    if rows == 1:
        return Tile(1 if gated else 2, min(2048, triton.next_power_of_2(inputs)), 8)
    return Tile(16, 256, 2, 3 if gated else 4, 1024)


def _launch(
    states: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    made: list[Tensor],
    gated: bool,
    tile: Tile | None,
    lanes: bool | None,
    early: bool | None,
) -> None:
    inputs = states.shape[-1]
    rows = states.numel() // inputs
    states = states.contiguous()
    tile = tile or default_tile(rows, inputs, gated=gated)
    count = 1 if gated else len(weights)
    sizes = [weight.shape[0] for weight in weights[:count]] + [0] * (3 - count)
    blocks = [triton.cdiv(size, tile.outputs) for size in sizes]
    biased = biases[0] is not None
    lanes = rows == 1 if lanes is None else lanes
    if early is None:  # measured: one row gains by it, a pipeline of tensor cores loses
        early = lanes
    start = launch(states.device) if early else {"EARLY": False}
    with torch.cuda.device_of(states):
        _products[(sum(blocks),)](
            states, *_three(weights), *(_three(biases) if biased else (states,) * 3), *_three(made),
            *sizes, blocks[0], blocks[0] + blocks[1], rows, inputs,
            GATED=gated, BIAS=biased, LANES=lanes,
            N=tile.outputs, K=tile.inputs, ROWS=MOST_ROWS, STAGES=tile.stages,
            AHEAD=_lines(min(tile.ahead, inputs)),
            num_warps=tile.warps, num_stages=tile.stages, **start, **EXACT,
        )  # fmt: skip


def _lines(ahead: int) -> int:
    return 1 << (ahead.bit_length() - 1) if ahead >= LINE.value else 0


def _three(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [*given, *[given[0]] * (3 - len(given))]


@triton.jit(do_not_specialize=["outputs0", "outputs1", "outputs2", "second", "third", "rows"])
def _products(
    states, weight0, weight1, weight2, bias0, bias1, bias2, output0, output1, output2,
    outputs0, outputs1, outputs2, second, third, rows, inputs,
    GATED: tl.constexpr, BIAS: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply all rows with one block of outputs; blocks are counted through all weights."""
    let_next_start(EARLY)
    block = tl.program_id(0)
    weight, bias, output, outputs = weight0, bias0, output0, outputs0
    if not GATED:
        if block >= third:
            weight, bias, output, outputs = weight2, bias2, output2, outputs2
            block -= third
        elif block >= second:
            weight, bias, output, outputs = weight1, bias1, output1, outputs1
            block -= second
    n = block * N + tl.arange(0, N)
    there = n < outputs
    first = n.to(tl.int64) * inputs
    r = tl.arange(0, ROWS)
    if LANES:
        sums, others = _in_lanes(
            states, weight, weight1, first, there, inputs, GATED, N, K, EARLY
        )  # fmt: skip
    else:
        sums, others = _on_cores(
            states, weight, weight1, first, there, r, rows, inputs,
            GATED, N, K, ROWS, STAGES, AHEAD, EARLY,
        )  # fmt: skip
    kind = output.dtype.element_ty
    if BIAS:
        sums += _per_output(bias, n, there, LANES)
        if GATED:
            others += _per_output(bias1, n, there, LANES)
    if GATED:
        opening = sums.to(kind).to(tl.float32)
        opening = (opening / (1.0 + tl.exp(-opening))).to(kind).to(tl.float32)
        sums = opening * others.to(kind).to(tl.float32)
    if LANES:
        tl.store(output + n, sums.to(kind), mask=there)
    else:
        at = output + r[None, :] * outputs + n[:, None]
        tl.store(at, sums.to(kind), mask=there[:, None] & (r < rows)[None, :])


@triton.jit
def _in_lanes(
    states, weight, other, first, there, inputs,
    GATED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return the sums of one row, [N], of one weight or of two; one tile is read ahead."""
    k = tl.arange(0, K)
    parts = tl.zeros([N, K], tl.float32)
    w = _tile(weight, first, 0, k, there, inputs)
    if GATED:
        other_parts = tl.zeros([N, K], tl.float32)
        v = _tile(other, first, 0, k, there, inputs)
    wait_for_previous(EARLY)
    for start in range(0, inputs, K):
        next_w = _tile(weight, first, start + K, k, there, inputs)
        if GATED:
            next_v = _tile(other, first, start + K, k, there, inputs)
        x = tl.load(states + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        parts = tl.fma(w.to(tl.float32), tl.broadcast_to(x[None, :], [N, K]), parts)
        w = next_w
        if GATED:
            other_parts = tl.fma(
                v.to(tl.float32), tl.broadcast_to(x[None, :], [N, K]), other_parts
            )  # fmt: skip
            v = next_v
    sums = tl.sum(parts, 1)
    others = sums
    if GATED:
        others = tl.sum(other_parts, 1)
    return sums, others


@triton.jit
def _on_cores(
    states, weight, other, first, there, r, rows, inputs,
    GATED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return the sums of all rows, [N, ROWS], of one weight or of two."""
    k = tl.arange(0, K)
    sums = tl.zeros([N, ROWS], tl.float32)
    others = sums
    if EARLY and AHEAD > 0:
        last = tl.max(tl.where(there, first, 0), 0)
        _fetch(weight, tl.minimum(first, last), AHEAD)
        if GATED:
            _fetch(other, tl.minimum(first, last), AHEAD)
    wait_for_previous(EARLY)
    for start in tl.range(0, inputs, K, num_stages=STAGES):
        inside = start + k < inputs
        x = tl.load(
            states + r[None, :] * inputs + (start + k)[:, None],
            mask=inside[:, None] & (r < rows)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(_tile(weight, first, start, k, there, inputs), x, sums)
        if GATED:
            others = tl.dot(_tile(other, first, start, k, there, inputs), x, others)
    return sums, others


@triton.jit
def _tile(weight, first, start, k, there, inputs):
    """Read [N, K] of a weight, which no other program reads."""
    inside = start + k < inputs
    return tl.load(
        weight + first[:, None] + (start + k)[None, :],
        mask=there[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def _fetch(weight, first, AHEAD: tl.constexpr):
    """Bring the first inputs of every output into the second-level cache."""
    line = tl.arange(0, AHEAD // LINE) * LINE
    at = (weight + first[:, None] + line[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _per_output(bias, n, there, LANES: tl.constexpr):
    values = tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    if not LANES:
        values = values[:, None]
    return values
