"""Launch the kernels of FlexPrefill's selection: five at most in exact mode, none waited for."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kvdock.kernels.blocks import BlockLists
from kvdock_flexprefill import compat, kernels, row_kernels
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import Pattern
from kvdock_flexprefill.stages import (
    DEFAULT,
    Problem,
    Tuning,
    block_levels,
    new_index,
    pool,
    row_logits,
)

LARGEST_HEAD = 128
MOST_BLOCKS = 8192


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
        if options.mode == "compat":
            return compat.select(problem)
        level, mean = block_levels(problem)
        chosen, aware = decide(problem, level, mean)
        index = new_index(problem)
        if options.tau > 0:
            row_logits(problem, *pool(problem, aware), aware, index)
        return emit(problem, chosen, aware, index)


def pattern(query: Tensor, key: Tensor, scaling: float, options: FlexPrefillOptions) -> Pattern:
    """Compute `kvdock_flexprefill.reference.find_pattern`."""
    problem = Problem(query, key, scaling, options)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        if options.mode == "compat":
            chosen, aware = compat.decide(problem)
        else:
            chosen, aware = decide(problem, *block_levels(problem))
    shape = (*query.shape[:2], -1)
    aware = aware.view(shape[:2]) if options.tau > 0 else aware.new_zeros(shape[:2])
    return Pattern(chosen[0].bool().view(shape), chosen[1].bool().view(shape), aware.bool())


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
