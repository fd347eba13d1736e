"""Run the Triton kernels on small inputs and print how far they are from float64, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_kernels.py` runs it.
"""

import itertools
import json
import os
import sys
from pathlib import Path

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock_h2o.kernels import Tile, column_sums, log2_sum_exp2

sys.path.insert(0, str(Path(__file__).parent))
import oracle

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
SMALL = Tile(keys=16, queries=16, warps=4, stages=2)


def draw(seed, rows, kv_heads, group, q, n, head_dim, dtype):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, kv_heads * group, q, head_dim, generator=generator) * 2
    keys = torch.randn(rows, kv_heads, n, head_dim, generator=generator)
    return queries.to(DEVICE, dtype), keys.to(DEVICE, dtype)


def error(queries, keys, tile, given=False):
    """Return the largest relative errors of the sums, the levels, and the total mass."""
    scaling = queries.shape[-1] ** -0.5
    exact, levels = [], []
    for one, other in zip(queries.cpu(), keys.cpu(), strict=True):
        a, lse = oracle.probabilities(one, other, scaling=scaling, with_lse=True)
        exact.append(oracle.column_sums(a, keys.shape[1]))
        levels.append(lse)
    exact, levels = torch.stack(exact), torch.stack(levels)
    lse = levels.float().to(queries.device) if given else None
    found = column_sums(queries, keys, scaling, lse, tile=tile, lse_tile=tile).cpu().double()
    level = log2_sum_exp2(queries, keys, scaling, tile=tile).cpu().double()
    again = column_sums(queries, keys, scaling, lse, tile=tile, lse_tile=tile).cpu().double()
    mass = queries.shape[1] // keys.shape[1] * queries.shape[2]
    return {
        "sums": ((found - exact).abs() / exact).max().item(),
        "lse": (level * torch.log(torch.tensor(2.0)).double() - levels).abs().max().item(),
        "mass": ((found.sum(-1) - mass).abs() / mass).max().item(),
        "same": torch.equal(found, again),
    }


def runs():
    """Yield (name, errors) for head dims, groups, dtypes, chunks and tiles."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    for seed, (name, head_dim) in enumerate(itertools.product(dtypes, (64, 96, 128))):
        q, k = draw(seed, 1, 1, 1 + 2 * (seed % 2), 21, 21, head_dim, dtypes[name])
        yield f"{name} D={head_dim}", error(q, k, SMALL)
    for q_length, n in ((1, 1), (1, 20), (5, 33), (16, 32), (17, 34)):
        q, k = draw(n, 1, 2, 2, q_length, n, 64, torch.float32)
        yield f"{q_length} of {n}", error(q, k, SMALL)
    q, k = draw(7, 2, 1, 4, 35, 51, 64, torch.float32)
    for keys, queries in ((16, 32), (32, 16), (16, 64), (64, 64)):
        tile = Tile(keys=keys, queries=queries, warps=4, stages=2)
        yield f"tile {keys}x{queries}", error(q, k, tile, given=keys == 16)
    # what a model passes: heads and tokens transposed, so that rows are not next to each other
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    yield "transposed, default tile", error(q, k, None)
    copies = Tile(keys=16, queries=16, warps=4, stages=2, copies=True)
    yield "transposed, copy unit", error(q.half(), k.half(), copies, given=True)
    q, k = draw(8, 1, 1, 2, 20, 20, 16, torch.float32)
    yield "D=16", error(q, k, SMALL)


print(json.dumps(dict(runs())))
