"""Run the Triton kernels of block-sparse attention on small inputs; print errors as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_sparse_triton.py` runs it.
"""

import json
import os
import sys
import warnings
from pathlib import Path

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    # an empty row's logarithm and reciprocal, which the kernel throws away
    warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)

import torch

from kvdock.kernels.blocks import BlockGrid, BlockLists, lists_from_mask, mask_from_lists
from kvdock.kernels.blocks_triton import compact
from kvdock.kernels.sparse_triton import SparseTile, block_sparse, takes_descriptors
from kvdock.policy import AttentionParams

sys.path.insert(0, str(Path(__file__).parent))
import sparse_oracle

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
SMALL = SparseTile(queries=16, keys=16, warps=4, stages=2)
TILES = {
    "parts": SMALL,
    "whole blocks": SparseTile(queries=32, keys=32, warps=4, stages=2, by_head=False),
    "descriptors": SparseTile(queries=32, keys=16, warps=4, stages=2, descriptors=True),
    "descriptors, whole blocks": SparseTile(32, 32, 4, 2, descriptors=True),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def run(grid, dim, tile, dtype=torch.float32, *, heads=4, kv_heads=1, rows=1, empty=False):
    """Return the output's and the log-sum-exps' largest error, in units of the tolerance."""
    made = sparse_oracle.states(
        grid, dim, rows=rows, heads=heads, kv_heads=kv_heads, dtype=dtype, seed=grid.keys
    )
    mask = sparse_oracle.block_mask(grid, rows=rows, heads=heads, seed=grid.keys)
    if empty:
        mask[0, 1, 0] = False
    lists = lists_from_mask(mask, grid.block)
    lists = BlockLists(lists.count.to(DEVICE), lists.index.to(DEVICE), grid.block)
    states = [x.transpose(1, 2).to(DEVICE).transpose(1, 2) for x in made]
    params = AttentionParams(dim**-0.5)
    found, lse = block_sparse(*states, lists, params, tile=tile, with_lse=True)
    expected = sparse_oracle.oracle(*made, mask, grid, params.scaling)
    levels = sparse_oracle.log_sums(*made[:2], mask, grid, params.scaling)
    off = (found.cpu().double() - expected).abs().max()
    real = levels > float("-inf")
    apart = (lse.cpu().double() - levels)[real].abs().max() if real.any() else torch.zeros(())
    return {
        "output": float(off) / TOLERANCE[dtype],
        "lse": float(apart) / 1e-4,
        "empty": bool((lse.cpu()[~real] == float("-inf")).all()),
    }


def runs():
    """Yield (name, errors) for tiles, head dims, groups, dtypes and offsets."""
    for name, tile in TILES.items():
        yield (
            name,
            run(BlockGrid(50, 107, 32), 16, tile, kv_heads=2, rows=2 if tile is SMALL else 1),
        )
    for dtype in (torch.float16, torch.bfloat16):
        yield f"{dtype}", run(BlockGrid(40, 40, 32), 64, SMALL, dtype, heads=2)
    for dim in (96, 128):
        yield f"D={dim}", run(BlockGrid(33, 33, 32), dim, SMALL, heads=1)
    tile = TILES["descriptors"]
    yield "D=24 by descriptors", run(BlockGrid(33, 33, 32), 24, tile, heads=2, kv_heads=2)
    for queries, keys in ((1, 1), (31, 31), (32, 64), (3, 66), (65, 65)):
        grid = BlockGrid(queries, keys, 32)
        yield f"{queries} of {keys}", run(grid, 16, SMALL, heads=2)
    yield "a group of four, an empty row", run(BlockGrid(40, 40, 16), 16, SMALL, empty=True)
    yield "default tile", run(BlockGrid(70, 130, 64), 16, None, heads=2)


def compaction():
    """Say whether lists come out of the kernel as out of plain torch."""
    mask = torch.rand(2, 3, 5, 37, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 0] = False
    count, index = compact(mask.to(DEVICE))
    plain = lists_from_mask(mask, 16)
    back = mask_from_lists(BlockLists(count, index, 16), 37).cpu()
    return torch.equal(count.cpu(), plain.count) and torch.equal(back, mask)


def descriptors():
    """Say which layouts the tensor memory accelerator takes."""
    usual = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16).transpose(1, 2)
    return {
        "usual": takes_descriptors(usual),
        "odd head_dim": takes_descriptors(usual.new_zeros(1, 2, 64, 92)),
        "odd start": takes_descriptors(usual.new_zeros(2 * 64 * 64 + 1)[1:].view(1, 2, 64, 64)),
        "odd rows": takes_descriptors(usual.new_zeros(1, 2, 64, 65)[..., :64]),
    }


print(json.dumps({"runs": dict(runs()), "compaction": compaction(), "descriptors": descriptors()}))
