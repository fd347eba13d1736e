"""Run the Triton kernels on small inputs and print how they differ from float64, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_kernels.py` runs it.
"""

import json
import os
import sys
import warnings

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock.kernels.blocks import mask_from_lists
from kvdock_xattention.grid import TileGrid
from kvdock_xattention.pipeline import select_by_kernels
from kvdock_xattention.reference import block_mass, chosen_blocks
from kvdock_xattention.score import Shape

warnings.filterwarnings("ignore", "divide by zero encountered in log2")  # a block without mass
DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
SMALL = Shape(queries=16, keys=16, inner=16, warps=4, stages=2)


def run(
    q, n, *, rows=1, kv_heads=1, group=2, d=16, stride=4, block=16, dtype=torch.float32,
    shape=SMALL, thresholds=(0.7,), loose=0, share=False, level_bytes=2**30,
):  # fmt: skip
    """Return how far masses are off, and how many blocks lists hold too many or too few."""
    generator = torch.Generator().manual_seed(q * n)
    # what a model passes: heads and tokens transposed, so that rows are not next to each other
    query = torch.randn(rows, q, kv_heads * group, d, generator=generator).transpose(1, 2) * 2
    key = torch.randn(rows, n, kv_heads, d, generator=generator).transpose(1, 2)
    query, key = query.to(DEVICE, dtype), key.to(DEVICE, dtype)
    grid, table = TileGrid(q, n, stride, block), torch.tensor(thresholds, device=DEVICE)
    size = (rows, kv_heads * group, grid.blocks.rows, grid.blocks.key_blocks)
    mass = torch.full(size, -1.0, device=DEVICE)
    lists = select_by_kernels(
        query, key, 0.3, grid, table, loose=loose, share=share, shape=shape, mass=mass,
        level_bytes=level_bytes,
    )  # fmt: skip
    exact = block_mass(query.double(), key.double(), 0.3, grid)
    if share:
        exact = exact.unflatten(1, (kv_heads, group)).sum(2).repeat_interleave(group, 1)
        mass = mass[:, ::group].repeat_interleave(group, 1)
    mask = mask_from_lists(lists, size[-1])
    wanted = chosen_blocks(exact, grid.blocks.first, table, loose)
    index = lists.index
    entry = torch.arange(size[-1] - 1, device=DEVICE)
    ascending = (index.diff(dim=-1) > 0) | (entry >= lists.count[..., None] - 1)
    return {
        "mass": (mass - exact).abs().max().item(),
        "differ": int((mask != wanted).sum()),
        "kept": int(wanted.sum()),
        "ascending": bool(ascending.all()),
        "valid": bool(((index >= 0) & (index < size[-1])).all()),
    }


def runs():
    """Yield (name, differences) for strides, head dims, dtypes, chunks, groups, parts and rules."""
    for stride in (4, 8, 16):
        yield f"S={stride}", run(83, 83, stride=stride, block=16)
    half, brain = torch.float16, torch.bfloat16
    yield "D=64", run(40, 40, d=64, dtype=half, shape=Shape(16, 32, 32, 4, 2, 1))
    yield "D=96", run(40, 40, d=96, stride=8, dtype=brain)
    yield "one token", run(1, 1)
    for q, n in ((1, 50), (37, 70), (48, 80), (33, 97)):
        yield f"{q} of {n}", run(q, n, group=3, stride=8, thresholds=(0.3, 0.9, 0.6))
    wide = Shape(queries=16, keys=32, inner=16, warps=4, stages=2, band=3)
    yield "blocks of 32, bands of 3", run(140, 140, group=1, block=32, shape=wide)
    yield "rows and heads", run(50, 61, rows=2, kv_heads=2, thresholds=(0.0, 0.5, 0.9, 1.0))
    yield "parts", run(90, 101, rows=2, level_bytes=4096)
    yield "compat", run(100, 100, loose=4, thresholds=(0.0, 0.6))
    yield "shared", run(60, 60, kv_heads=2, share=True, thresholds=(0.5,))
    walking = Shape(queries=16, keys=16, inner=16, warps=4, stages=2, programs=1)
    if DEVICE == "cuda":
        yield "walking", run(300, 333, shape=walking)
        described = Shape(queries=64, keys=64, inner=32, warps=4, stages=2, descriptors=True)
        yield "described", run(800, 901, d=64, dtype=half, block=128, shape=described)


if __name__ == "__main__":
    print(json.dumps(dict(runs())))
