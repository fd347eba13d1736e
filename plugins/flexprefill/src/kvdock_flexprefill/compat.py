"""Launch the kernels of the published selection: ten at most, none waited for."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvdock.kernels.blocks import BlockLists
from kvdock_flexprefill import compat_kernels, compat_rows
from kvdock_flexprefill.reference import PUBLISHED_BLOCK
from kvdock_flexprefill.stages import (
    LOG2E,
    Problem,
    block_levels,
    new_index,
    pool,
    row_logits,
    upcast,
)


def select(problem: Problem) -> BlockLists:
    """Compute `kvdock_flexprefill.selection.select` in compat mode, for gamma < 1."""
    chosen, aware = decide(problem, *block_levels(problem))
    index = new_index(problem)
    edges = new_edges(problem)
    if problem.options.tau > 0:
        row_logits(problem, *pool(problem, aware), aware, index)
        find_edges(problem, aware, index, edges)
    return emit(problem, chosen, aware, index, edges)


def decide(problem: Problem, level: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `launch.decide` returns, by the published counts."""
    return choose(problem, *count(problem, masses(problem, level)), mean)


def masses(problem: Problem, level: Tensor) -> Tensor:
    """Return masses per token, and per offset in parts, float32 [B / KEYS + 2, b·H, Nk, B]."""
    query, key, grid, tuning = problem.query, problem.key, problem.grid, problem.tuning
    pairs, rows, keys = problem.pairs, min(grid.block, grid.queries), mass_keys(problem)
    lse = level.new_empty(pairs, grid.block)
    some = min(32, grid.block)
    compat_kernels.merge_levels[(pairs, grid.block // some)](
        level, lse, rows, grid.key_blocks, BLOCK=grid.block, ROWS=some, num_warps=4
    )
    mass = level.new_empty(grid.block // keys + 2, pairs, grid.key_blocks, grid.block)
    tiles = grid.key_blocks * grid.block // keys
    share = triton.cdiv(tiles, max(1, min(tiles, tuning.programs // pairs)))
    compat_kernels.tile_masses[(pairs, triton.cdiv(tiles, share))](
        query, key, lse, mass, *query.stride()[:3], *key.stride()[:3],
        pairs, query.shape[1], rows, grid.queries, grid.keys, tiles, share,
        problem.scaling * LOG2E,
        GROUP=problem.group, HEAD_DIM=query.shape[3], PADDED=problem.padded, BLOCK=grid.block,
        KEYS=keys, STAGES=tuning.mass_stages, UPCAST=upcast(query), num_warps=tuning.warps,
    )  # fmt: skip
    return mass


def mass_keys(problem: Problem) -> int:
    """Return the keys per step of the second pass."""
    return min(problem.tuning.mass_keys, problem.options.block)


def count(problem: Problem, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of blocks, float32 [2, b·H, Nk], and the published counts, int32 [2, b·H]."""
    grid, tuning, pairs = problem.grid, problem.tuning, problem.pairs
    sums = mass.new_empty(2, pairs, grid.key_blocks)
    found = mass.new_empty(2, pairs, dtype=torch.int32)
    chunk = max(1, min(tuning.entries // grid.block, triton.next_power_of_2(grid.key_blocks)))
    compat_kernels.count_largest[(pairs, 2)](
        mass, sums, found, pairs, grid.keys, grid.key_blocks, single(problem.options.gamma),
        BLOCK=grid.block, KEYS=mass_keys(problem), CHUNK=chunk, num_warps=tuning.entry_warps,
    )  # fmt: skip
    return sums, found


def choose(problem: Problem, sums: Tensor, counted: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return verticals and slashes, int8 [2, b·H, Nk], and query-aware heads, int8 [b·H]."""
    options, pairs, blocks = problem.options, problem.pairs, problem.grid.key_blocks
    chosen = sums.new_empty(2, pairs, blocks, dtype=torch.int8)
    aware = sums.new_empty(pairs, dtype=torch.int8)
    compat_kernels.decide_compat[(pairs,)](
        sums, counted, mean, chosen, aware, pairs, blocks, options.tau, *options.bounds(blocks),
        PUBLISHED=PUBLISHED_BLOCK, WIDTH=problem.width, PATTERN=options.tau > 0,
        num_warps=problem.tuning.decide_warps,
    )  # fmt: skip
    return chosen, aware


def new_edges(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for `find_edges`: int32 [b·H], [b·H] and [b·H, M]."""
    pairs, rows = problem.pairs, problem.grid.rows
    memory = problem.query.new_empty(rows + 2, pairs, dtype=torch.int32)
    return memory[0], memory[1], memory[2:].view(pairs, rows)


def find_edges(
    problem: Problem, aware: Tensor, index: Tensor, edges: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Turn the scores of query-aware heads' rows into shares, and find the least one kept."""
    grid, width, pairs = problem.grid, problem.width, problem.pairs
    shares, sizes = index.view(torch.float32), (grid.first, grid.rows, grid.key_blocks)
    compat_rows.row_shares[(grid.rows, pairs)](
        shares, aware, *sizes, WIDTH=width, num_warps=row_warps(problem)
    )
    columns = min(width, 256)
    rows = max(1, min(problem.tuning.entries // columns, triton.next_power_of_2(grid.rows)))
    compat_rows.find_edge[(pairs,)](
        shares, aware, *edges, *sizes, problem.options.gamma,
        ROWS=rows, COLUMNS=columns, num_warps=problem.tuning.edge_warps,
    )  # fmt: skip


def emit(
    problem: Problem,
    chosen: Tensor,
    aware: Tensor,
    index: Tensor,
    edges: tuple[Tensor, Tensor, Tensor],
) -> BlockLists:
    """Return the lists of all rows, written over their shares."""
    grid = problem.grid
    count = index.new_empty(problem.pairs, grid.rows)
    compat_rows.emit_compat[(grid.rows, problem.pairs)](
        chosen, aware, index.view(torch.float32), *edges, count, index,
        problem.pairs, grid.first, grid.rows, grid.key_blocks,
        WIDTH=problem.width, PATTERN=problem.options.tau > 0, num_warps=row_warps(problem),
    )  # fmt: skip
    shape = problem.query.shape[:2]
    return BlockLists(count.view(*shape, -1), index.view(*shape, *index.shape[1:]), grid.block)


def row_warps(problem: Problem) -> int:
    """Return the warps of a program that holds one row of blocks."""
    return min(8, max(1, problem.width // problem.tuning.emit_columns))


def single(value: float) -> float:
    """Return a number rounded to float32, as torch compares it with such a sum."""
    return float(torch.tensor(value, dtype=torch.float32))
