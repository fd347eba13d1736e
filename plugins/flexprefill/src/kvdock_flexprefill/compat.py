"""Launch the kernels of the published selection: seven at most, none waited for."""

from __future__ import annotations

import ctypes

import torch
import triton
from torch import Tensor

from kvdock.kernels.blocks import BlockLists
from kvdock_flexprefill import compat_kernels, compat_rows
from kvdock_flexprefill.reference import PUBLISHED_BLOCK
from kvdock_flexprefill.stages import LOG2E, Problem, pool, upcast


def select(problem: Problem) -> BlockLists:
    """Compute `kvdock_flexprefill.selection.select` in compat mode, for gamma < 1."""
    chosen, aware = decide(problem)
    if problem.options.tau == 0:
        return emit(problem, chosen, aware)
    shares = row_shares(problem, *pool(problem, aware), aware)
    return emit(problem, chosen, aware, shares, find_edges(problem, aware, shares))


def decide(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return what `launch.decide` returns, by the published counts."""
    level, mean = levels(problem)
    return choose(problem, *masses(problem, level), mean)[:2]


def levels(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the last queries' log-sum-exps over parts of the keys, and mean scores.

    Returns:
        (float32 [b·H, S, B] in base 2, float32 [b·H, Nk] with the model's scale).
    """
    query, key, grid, tuning = problem.query, problem.key, problem.grid, problem.tuning
    blocks, pairs = grid.key_blocks, problem.pairs
    share = triton.cdiv(blocks, max(1, min(blocks, tuning.programs // pairs)))
    parts = triton.cdiv(blocks, share)
    level = query.new_empty(pairs, parts, grid.block, dtype=torch.float32)
    mean = query.new_empty(pairs, blocks, dtype=torch.float32)
    compat_kernels.part_levels[(pairs, parts)](
        query, key, level, mean, *query.stride()[:3], *key.stride()[:3],
        query.shape[1], min(grid.block, grid.queries), grid.queries, grid.keys, blocks, share,
        problem.scaling * LOG2E, problem.scaling,
        GROUP=problem.group, HEAD_DIM=query.shape[3], PADDED=problem.padded, BLOCK=grid.block,
        STAGES=tuning.stages, PATTERN=problem.options.tau > 0, UPCAST=upcast(query),
        num_warps=tuning.warps, maxnreg=tuning.registers,
    )  # fmt: skip
    return level, mean


def masses(problem: Problem, level: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return masses per token and offset, float32 [2, b·H, Nk, B], seams and keys between seams.

    The seams, float32 [b·H, S, B], have to be added to the masses of offsets.
    """
    query, key, grid, tuning = problem.query, problem.key, problem.grid, problem.tuning
    pairs, keys = problem.pairs, grid.block // 4 * tuning.mass_parts
    mass = level.new_empty(2, pairs, grid.key_blocks, grid.block)
    tiles = grid.key_blocks * grid.block // keys
    share = triton.cdiv(tiles, max(1, min(tiles, tuning.mass_programs // pairs)))
    share = max(share, grid.block // keys)
    parts = triton.cdiv(tiles, share)
    seams = level.new_empty(pairs, parts, grid.block)
    compat_kernels.tile_masses[(pairs, parts)](
        query, key, level, mass, seams, *query.stride()[:3], *key.stride()[:3],
        pairs, query.shape[1], min(grid.block, grid.queries), grid.queries, grid.keys, tiles,
        share, level.shape[1], problem.scaling * LOG2E,
        GROUP=problem.group, HEAD_DIM=query.shape[3], PADDED=problem.padded, BLOCK=grid.block,
        KEYS=keys, STAGES=tuning.mass_stages, UPCAST=upcast(query), num_warps=tuning.mass_warps,
        maxnreg=tuning.mass_registers,
    )  # fmt: skip
    return mass, seams, share * keys


def choose(
    problem: Problem, mass: Tensor, seams: Tensor, span: int, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return verticals and slashes, query-aware heads, and what they were chosen by.

    Returns:
        (int8 [2, b·H, Nk], int8 [b·H], sums of blocks, float32 [2, b·H, Nk], and the published
        counts, int32 [2, b·H]).
    """
    grid, options, tuning = problem.grid, problem.options, problem.tuning
    pairs, blocks = problem.pairs, grid.key_blocks
    sums = mass.new_empty(2, 2, pairs, blocks)
    counted = mass.new_empty(2, pairs, dtype=torch.int32)
    chosen = mass.new_empty(2, pairs, blocks, dtype=torch.int8)
    aware = mass.new_empty(pairs, dtype=torch.int8)
    chunk = max(grid.block, min(tuning.entries, triton.next_power_of_2(blocks) * grid.block))
    compat_kernels.choose[(pairs, 2)](
        mass, seams, mean, sums, counted, new_slots(problem, 2 * pairs), chosen, aware,
        pairs, grid.keys, blocks, span, seams.shape[1], single(options.gamma), options.tau,
        *options.bounds(blocks), BLOCK=grid.block, CHUNK=chunk, SLOTS=problem.tuning.slots,
        WIDTH=problem.width, PUBLISHED=PUBLISHED_BLOCK, PATTERN=options.tau > 0,
        num_warps=tuning.entry_warps,
    )  # fmt: skip
    return chosen, aware, sums[0], counted


def new_slots(problem: Problem, searches: int) -> Tensor:
    """Return memory for searches, int32 [searches, 1 + SLOTS]."""
    return problem.query.new_empty(searches, 1 + problem.tuning.slots, dtype=torch.int32)


def row_shares(problem: Problem, query_means: Tensor, key_means: Tensor, aware: Tensor) -> Tensor:
    """Return the shares of query-aware heads' rows, float32 [b·H, E]."""
    grid, tuning = problem.grid, problem.tuning
    packed = triton.cdiv(grid.causal_blocks, 16) * 16
    shares = query_means.new_empty(problem.pairs, packed)
    compat_rows.row_shares[(triton.cdiv(grid.rows, tuning.share_rows), problem.pairs)](
        query_means, key_means, aware, shares,
        grid.first, grid.rows, grid.key_blocks, problem.scaling * LOG2E,
        GROUP=problem.group, HEAD_DIM=query_means.shape[2], PADDED=problem.padded,
        ROWS=tuning.share_rows, COLUMNS=tuning.score_tile, num_warps=4,
    )  # fmt: skip
    return shares


def find_edges(problem: Problem, aware: Tensor, shares: Tensor) -> Tensor:
    """Find the least share query-aware heads keep, int32 [2, b·H]: its bits, its last place."""
    grid, tuning = problem.grid, problem.tuning
    edges = aware.new_empty(2, problem.pairs, dtype=torch.int32)
    compat_rows.find_edge[(problem.pairs,)](
        shares, aware, new_slots(problem, problem.pairs), edges[0], edges[1],
        grid.first, grid.rows, problem.options.gamma,
        CHUNK=min(tuning.entries, triton.next_power_of_2(shares.shape[1])), SLOTS=tuning.slots,
        num_warps=tuning.edge_warps,
    )  # fmt: skip
    return edges


def emit(
    problem: Problem,
    chosen: Tensor,
    aware: Tensor,
    shares: Tensor | None = None,
    edges: Tensor | None = None,
) -> BlockLists:
    """Return the lists of all rows."""
    grid = problem.grid
    index = aware.new_empty(problem.pairs, grid.rows, grid.key_blocks, dtype=torch.int32)
    count = aware.new_empty(problem.pairs, grid.rows, dtype=torch.int32)
    edge, last = (None, None) if edges is None else edges
    compat_rows.emit_compat[(grid.rows, problem.pairs)](
        chosen, aware, shares, edge, last, count, index,
        problem.pairs, grid.first, grid.rows, grid.key_blocks,
        WIDTH=problem.width, PATTERN=edges is not None,
        num_warps=min(8, max(1, problem.width // problem.tuning.emit_columns)),
    )  # fmt: skip
    shape = problem.query.shape[:2]
    return BlockLists(count.view(*shape, -1), index.view(*shape, *index.shape[1:]), grid.block)


def single(value: float) -> float:
    """Return a number rounded to float32, as torch compares it with such a sum."""
    return ctypes.c_float(value).value
