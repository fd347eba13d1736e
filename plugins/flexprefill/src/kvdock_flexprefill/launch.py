"""Launch the kernels of FlexPrefill's selection, in exact mode: five at most, none waited for."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, BlockLists
from kvdock_flexprefill import kernels, row_kernels
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import Pattern

LARGEST_HEAD = 128
MOST_BLOCKS = 8192
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Say how the kernels are cut.

    Args:
        programs: how many share the key blocks of all heads in the first kernel.
        warps, stages, registers: of the first kernel, which does nearly all the arithmetic.
        decide_warps, chunk: of the second kernel; rows of log-sum-exps read at a time.
        emit_columns: list columns per warp of the last kernel.
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


def serves(query: Tensor, key: Tensor, options: FlexPrefillOptions) -> bool:
    """Say whether the kernels take these states."""
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= LARGEST_HEAD
        and key.shape[2] <= MOST_BLOCKS * options.block
    )


def select(
    query: Tensor,
    key: Tensor,
    scaling: float,
    options: FlexPrefillOptions,
    tuning: Tuning = DEFAULT,
) -> BlockLists:
    """Compute `kvdock_flexprefill.selection.select` for gamma < 1."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    problem = Problem(query, key, scaling, options, tuning)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        level, mean = block_levels(problem)
        chosen, aware = decide(problem, level, mean)
        index = new_index(problem)
        if options.tau > 0:
            row_logits(problem, *pool(problem, aware), aware, index)
        return emit(problem, chosen, aware, index)


def pattern(query: Tensor, key: Tensor, scaling: float, options: FlexPrefillOptions) -> Pattern:
    """Compute `kvdock_flexprefill.reference.find_pattern` in exact mode."""
    problem = Problem(query, key, scaling, options)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        chosen, aware = decide(problem, *block_levels(problem))
    shape = (*query.shape[:2], -1)
    aware = aware.view(shape[:2]) if options.tau > 0 else aware.new_zeros(shape[:2])
    return Pattern(chosen[0].bool().view(shape), chosen[1].bool().view(shape), aware.bool())


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
        STAGES=tuning.stages, PATTERN=problem.options.tau > 0, UPCAST=_upcast(query),
        num_warps=tuning.warps, maxnreg=tuning.registers,
    )  # fmt: skip
    return level, mean


def decide(problem: Problem, level: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return verticals and slashes, int8 [2, b·H, Nk], and query-aware heads, int8 [b·H]."""
    grid, options, tuning = problem.grid, problem.options, problem.tuning
    blocks, pairs = grid.key_blocks, problem.pairs
    parts = level.new_empty(2, pairs, blocks)
    chosen = level.new_empty(2, pairs, blocks, dtype=torch.int8)
    aware = level.new_empty(pairs, dtype=torch.int8)
    kernels.decide[(pairs,)](
        level, mean, parts, chosen, aware, pairs, min(grid.block, grid.queries), grid.keys, blocks,
        options.gamma, options.tau, *options.bounds(blocks),
        BLOCK=grid.block, CHUNK=tuning.chunk, WIDTH=problem.width, PATTERN=options.tau > 0,
        num_warps=tuning.decide_warps,
    )  # fmt: skip
    return chosen, aware


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


def emit(problem: Problem, chosen: Tensor, aware: Tensor, index: Tensor) -> BlockLists:
    """Return the lists of all rows, written over their scores."""
    grid, options, width = problem.grid, problem.options, problem.width
    count = index.new_empty(problem.pairs, grid.rows)
    row_kernels.emit[(grid.rows, problem.pairs)](
        chosen, aware, index.view(torch.float32), count, index,
        problem.pairs, grid.first, grid.rows, grid.key_blocks, options.gamma,
        WIDTH=width, PATTERN=options.tau > 0,
        num_warps=min(8, max(1, width // problem.tuning.emit_columns)),
    )  # fmt: skip
    shape = problem.query.shape[:2]
    return BlockLists(count.view(*shape, -1), index.view(*shape, *index.shape[1:]), grid.block)


def _upcast(states: Tensor) -> bool:
    """Say whether to multiply in float32: the interpreter's NumPy knows no bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1" and states.dtype == torch.bfloat16
