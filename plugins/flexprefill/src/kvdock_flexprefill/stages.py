"""What both modes launch: scores of the last queries, means, and scores of pooled rows."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid
from kvdock_flexprefill import kernels, row_kernels
from kvdock_flexprefill.options import FlexPrefillOptions

LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Say how the kernels are cut.

    Args:
        programs: how many share the key blocks of all heads in the first kernel.
        warps, stages, registers: of the first kernel, which does nearly all the arithmetic.
        decide_warps, chunk: of the second kernel; rows of log-sum-exps read at a time.
        emit_columns: list columns per warp of the last kernel.
        mass_parts, mass_programs: keys per step of compat's second pass over the scores, in
            quarters of a block (1 or 2), and how many programs share the keys of all heads.
        mass_stages, mass_warps, mass_registers: how it is compiled. Four warps hold the quarters
            of a tile in registers.
        share_rows: block rows of compat's pooled attention per program.
        entries, slots, entry_warps, edge_warps: values that compat's two searches read at a time,
            values that they end with in registers, and the warps of either.
    """

    programs: int = 264
    warps: int = 8
    stages: int = 2
    registers: int | None = 128
    decide_warps: int = 8
    chunk: int = 32
    pool_warps: int = 4
    score_tile: int = 64
    emit_columns: int = 256
    mass_parts: int = 2
    mass_programs: int = 264
    mass_stages: int = 3
    mass_warps: int = 4
    mass_registers: int | None = None
    share_rows: int = 32
    entries: int = 4096
    slots: int = 8192
    entry_warps: int = 16
    edge_warps: int = 32


DEFAULT = Tuning()


@dataclass(frozen=True, slots=True)
class Problem:
    """Hold one call's states and sizes."""

    query: Tensor
    key: Tensor
    scaling: float
    options: FlexPrefillOptions
    tuning: Tuning = DEFAULT

    @property
    def grid(self) -> BlockGrid:
        """Return the grid of blocks."""
        return BlockGrid(self.query.shape[2], self.key.shape[2], self.options.block)

    @property
    def pairs(self) -> int:
        """Return b · H."""
        return self.query.shape[0] * self.query.shape[1]

    @property
    def group(self) -> int:
        """Return the query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def padded(self) -> int:
        """Return head_dim as a power of two."""
        return max(16, triton.next_power_of_2(self.query.shape[3]))

    @property
    def width(self) -> int:
        """Return the number of key blocks as a power of two."""
        return max(16, triton.next_power_of_2(self.grid.key_blocks))


def block_levels(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps of the last queries per key block, and mean scores.

    Returns:
        (float32 [b·H, Nk, B] in base 2, float32 [b·H, Nk] with the model's scale).
    """
    query, key, grid, tuning = problem.query, problem.key, problem.grid, problem.tuning
    blocks, pairs = grid.key_blocks, problem.pairs
    level = query.new_empty(pairs, blocks, grid.block, dtype=torch.float32)
    mean = query.new_empty(pairs, blocks, dtype=torch.float32)
    share = triton.cdiv(blocks, max(1, min(blocks, tuning.programs // pairs)))
    kernels.block_levels[(pairs, triton.cdiv(blocks, share))](
        query, key, level, mean, *query.stride()[:3], *key.stride()[:3],
        query.shape[1], min(grid.block, grid.queries), grid.queries, grid.keys, blocks, share,
        problem.scaling * LOG2E, problem.scaling,
        GROUP=problem.group, HEAD_DIM=query.shape[3], PADDED=problem.padded, BLOCK=grid.block,
        STAGES=tuning.stages, PATTERN=problem.options.tau > 0, UPCAST=upcast(query),
        num_warps=tuning.warps, maxnreg=tuning.registers,
    )  # fmt: skip
    return level, mean


def pool(problem: Problem, aware: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of blocks, float32 [b·H, M, D] and [b·K, Nk, D], where they are needed."""
    query, key, grid = problem.query, problem.key, problem.grid
    pairs, kv_pairs = problem.pairs, problem.pairs // problem.group
    head_dim = query.shape[3]
    query_means = query.new_empty(pairs, grid.rows, head_dim, dtype=torch.float32)
    key_means = query.new_empty(kv_pairs, grid.key_blocks, head_dim, dtype=torch.float32)
    row_kernels.pool[(grid.key_blocks, pairs + kv_pairs)](
        query, key, aware, query_means, key_means, *query.stride()[:3], *key.stride()[:3],
        pairs, query.shape[1], key.shape[1], grid.queries, grid.keys, grid.first, grid.rows,
        grid.key_blocks,
        GROUP=problem.group, HEAD_DIM=head_dim, PADDED=problem.padded, BLOCK=grid.block,
        num_warps=problem.tuning.pool_warps,
    )  # fmt: skip
    return query_means, key_means


def new_index(problem: Problem) -> Tensor:
    """Return memory for the lists, int32 [b·H, M, Nk]; until then it holds the rows' scores."""
    grid = problem.grid
    shape = (problem.pairs, grid.rows, grid.key_blocks)
    return problem.query.new_empty(shape, dtype=torch.int32)


def row_logits(
    problem: Problem, query_means: Tensor, key_means: Tensor, aware: Tensor, index: Tensor
) -> None:
    """Write the scores of query-aware heads' rows into the memory of the lists."""
    grid, size = problem.grid, problem.tuning.score_tile
    tiles = (triton.cdiv(grid.rows, size), triton.cdiv(grid.key_blocks, size), problem.pairs)
    row_kernels.row_logits[tiles](
        query_means, key_means, aware, index.view(torch.float32),
        grid.first, grid.rows, grid.key_blocks, problem.scaling * LOG2E,
        GROUP=problem.group, HEAD_DIM=query_means.shape[2], PADDED=problem.padded,
        ROWS=size, COLUMNS=size, num_warps=4,
    )  # fmt: skip


def upcast(states: Tensor) -> bool:
    """Say whether to multiply in float32: the interpreter's NumPy knows no bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1" and states.dtype == torch.bfloat16
