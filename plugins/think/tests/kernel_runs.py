"""Run the Triton kernel on small inputs and print how far it is from float64, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_kernels.py` runs it.
"""

import json
import os
import sys
from pathlib import Path

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock.storage import RowGroup
from kvdock_think import append_kernel, attention, kernels
from kvdock_think.storage import ThinKStorage

sys.path.insert(0, str(Path(__file__).parent))
import oracle

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
SMALL = kernels.Tile(tokens=16, stages=2)
if DEVICE == "cpu":  # the merge too is the kernel's, not plain torch
    from kvdock.kernels import split_kv_triton

    kernels.merge_splits = split_kv_triton.merge_splits


def run(
    lengths, *, head_dim=64, kept=48, value_dim=None, kv_heads=2, group=2, queries=1,
    recent=4, block=128, steps=0, dtype=torch.float32, splits=3, tile=SMALL, fixed=False,
):  # fmt: skip
    """Fill a storage, take some steps, and return the largest errors of output and log-sum-exp.

    With ``fixed`` the kernels append and read the lengths from the device.
    """
    value_dim = value_dim or head_dim
    generator = torch.Generator().manual_seed(sum(lengths) + kept)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [draw(kv_heads, n + steps, head_dim) for n in lengths]
    values = [draw(kv_heads, n + steps, value_dim) for n in lengths]
    chosen = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(kv_heads)])
    channels = chosen[:, :kept].sort(dim=1).values
    storage = ThinKStorage(recent, block)
    groups = [
        RowGroup(
            (row,), keys[row][None, :, :n].to(DEVICE), values[row][None, :, :n].to(DEVICE),
            torch.arange(n).expand(1, kv_heads, n), channels=channels[None].to(DEVICE),
        )
        for row, n in enumerate(lengths)
    ]  # fmt: skip
    storage.fill(groups, max(lengths) + steps + 3, ordered=True)
    held = storage.held
    live, start = (
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
        for numbers in (held.live, held.start)
    )
    for step in range(steps):
        at = [n + step for n in lengths]
        new = [
            torch.stack([states[row][:, n : n + 1] for row, n in enumerate(at)]).to(DEVICE)
            for states in (keys, values)
        ]
        if fixed:
            append_kernel.append(held, *new, live)
            live += 1
        else:
            storage.append_step(*new, at, 0)
    if not storage.even:
        _ = storage._lengths
    query = draw(len(lengths), kv_heads * group, queries, head_dim) * 2
    scaling = head_dim**-0.5
    most = held.keys.shape[2]
    cursor = attention.Cursor(live, start, most, recent + block, block) if fixed else None
    output, lse = kernels.attend(
        query.to(DEVICE), held, scaling, dtype, cursor=cursor, tile=tile, splits=splits
    )
    errors = []
    for row, n in enumerate(lengths):
        start = oracle.whole_from(n, n + steps, recent, block)
        filled = oracle.zero_filled(keys[row], channels, start)
        exact, level = oracle.attend(query[row], filled, values[row], scaling)
        errors.append((output[row].cpu().double() - exact).abs().max().item())
        errors.append((lse[row].cpu().double() - level).abs().max().item())
    return max(errors)


def runs():
    """Yield (name, error) for head sizes, kept channels, groups, lengths, dtypes, many queries."""
    for head_dim, kept in ((64, 32), (64, 48), (96, 64), (96, 48), (128, 80), (128, 64), (128, 96)):
        yield f"D={head_dim} D'={kept}", run([37], head_dim=head_dim, kept=kept)
    yield "D=16 D'=12", run([21], head_dim=16, kept=12)
    yield "D'=112, values 48", run([21], head_dim=128, kept=112, value_dim=48)
    yield "masked", run([37], head_dim=128, kept=80, tile=kernels.Tile(16, 4, 2, masked=True))
    for n in (1, 3, 4, 5, 16, 17, 20, 21):
        yield f"{n} tokens", run([n], splits=1 + n % 3)
    yield "ragged", run([33, 5, 1], group=1)
    yield "ragged, steps", run([33, 5, 1], steps=3, group=4)
    yield "blocks became narrow", run([20, 33], steps=13, recent=3, block=5)
    for lengths in ([20, 33], [7]):
        more = {"steps": 13, "recent": 3, "block": 5, "group": 4, "head_dim": 96}
        yield f"fixed steps {lengths}", run(lengths, fixed=True, **more)
    yield "no recent tokens", run([20], steps=2, recent=0)
    yield "more queries than a block", run([40, 29], queries=35, head_dim=16, kept=8)
    yield "8 heads a group", run([25], group=8, kv_heads=1)
    yield "float16", run([70], head_dim=128, kept=80, dtype=torch.float16)
    many = 70 if DEVICE == "cpu" else 200
    turns = (
        (1, 128, 80, 1), (1, 128, 64, 8), (9, 64, 48, 4), (9, 128, 80, 8),
        (many, 64, 32, 4), (many, 128, 80, 1),
    )  # fmt: skip
    for queries, head_dim, kept, group in turns:
        more = {"kv_heads": 1, "tile": None, "dtype": torch.float16}
        yield (
            f"float16 Q={queries} D'={kept} G={group}",
            run([300, 20], queries=queries, head_dim=head_dim, kept=kept, group=group, **more),
        )
    yield "bfloat16", run([70], head_dim=128, kept=80, dtype=torch.bfloat16)
    yield "chosen splits", run([70], splits=None, tile=None)


print(json.dumps(dict(runs())))
