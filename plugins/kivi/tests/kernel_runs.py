"""Run the Triton kernels on small inputs and print what they did beside the references, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_kernels.py` runs it.
"""

import itertools
import json
import os
import sys
import warnings
from pathlib import Path

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock_kivi import kernels, steps, writing
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed

sys.path.insert(0, str(Path(__file__).parent))
import oracle

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
MANY = 100 if DEVICE == "cpu" else 200  # queries, more than a kernel takes at once
warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)  # NaN on purpose, in NumPy


def draw(seed, rows, heads, tokens, dim, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, tokens, dim, generator=generator).to(DEVICE, dtype)


def empty(geometry, keys, room, key_dim=None):
    dim = keys.shape[-1]
    lead = tuple(keys.shape[:2])
    return Packed.empty(geometry, lead, room, (dim, key_dim or dim, dim), keys)


def attention(
    geometry, group, dim, lengths, dtype, *, queries=1, held=0, cut=None, splits=2, kv_heads=2,
    size=1, offset=4, result=FULL,
):  # fmt: skip
    """Return the largest errors of output and log-sum-exp against float64.

    Queries are ``size`` times the usual and one key channel stands ``offset`` apart.
    """
    rows, room = len(lengths), max(lengths)
    q = draw(1, rows, kv_heads * group, queries, dim, dtype) * size
    k, v = (draw(seed, rows, kv_heads, room, dim, dtype) for seed in (2, 3))
    k[..., 5] += offset
    channels, narrow = None, q
    if cut:
        index = torch.arange(cut, device=DEVICE) * (dim // cut)
        channels = index.expand(rows, kv_heads, cut).contiguous()
        narrow = q[..., index]
    cache = empty(geometry, k, room, cut)
    held_of = [held if n % geometry.residual == 0 else 0 for n in lengths]
    outputs, levels = [], []
    for row, n in enumerate(lengths):
        part, first = slice(row, row + 1), n - held_of[row]
        whole, gone = geometry.key_tokens(first), geometry.value_tokens(n)
        if whole:
            kernels.write_keys(cache, geometry, part, k[part, :, :whole], 0, channels)
        if gone:
            kernels.write_values(cache, geometry, part, v[part, :, :gone], 0)
        newest = torch.arange(max(n - geometry.residual, 0), n, device=DEVICE)
        cache.key_rest[row, :, newest % geometry.residual] = k[row, :, newest]
        cache.value_rest[row, :, newest % geometry.residual] = v[row, :, newest]
        keys, values = oracle.stored(
            k[row, :, :n].cpu(), v[row, :, :n].cpu(), geometry.bits, geometry.group,
            geometry.residual, held=held_of[row],
        )  # fmt: skip
        if cut:
            gaps = torch.ones(dim, dtype=torch.bool)
            gaps[:: dim // cut] = False
            keys[:, :whole, gaps] = 0
        output, level = oracle.attend(q[row].cpu(), keys, values, dim**-0.5)
        outputs.append(output)
        levels.append(level)
    order = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)  # any order of rows
    found, lse = kernels.attend(
        cache, geometry, q.flip(0), narrow.flip(0), order,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE), room, dim**-0.5,
        held=held, splits=splits, dtype=result,
    )  # fmt: skip
    return {
        "output": (found.flip(0).cpu() - torch.stack(outputs)).abs().max().item(),
        "lse": (lse.flip(0).cpu() - torch.stack(levels)).abs().max().item(),
    }


def packing(geometry, dim, dtype, cut=None):
    """Say which packed tensors differ from those that plain torch writes."""
    residual = geometry.residual
    tokens = 2 * residual + 17
    k, v = (draw(seed, 2, 2, tokens, dim, dtype) for seed in (4, 5))
    k[0, 0, :, 3], v[0, 1, 5] = 1.0, -0.0
    k[1, 1, 3, 5], v[1, 0, 7, 3] = float("inf"), float("nan")
    channels = None
    if cut:
        channels = (torch.arange(cut, device=DEVICE) * 2 + 1).expand(2, 2, cut).contiguous()
    caches = [empty(geometry, k, tokens + residual, cut) for _ in range(2)]
    writing.kernels_for = lambda states: None
    for cache, module in zip(caches, (kernels, writing), strict=True):
        rows = slice(0, 2)
        module.write_keys(cache, geometry, rows, k[:, :, : 2 * residual], 0, channels)
        module.write_values(cache, geometry, rows, v[:, :, : residual + 3], 0)
        module.write_values(cache, geometry, rows, v[:, :, residual + 3 : -residual], residual + 3)
        newest = torch.arange(tokens - residual, tokens, device=DEVICE)
        cache.value_rest[:, :, newest % residual] = v[:, :, newest]
    lengths = torch.full((2,), tokens, dtype=torch.int32, device=DEVICE)
    for step in range(5):
        new = [draw(seed + step, 2, 2, 1, dim, dtype) for seed in (6, 60)]
        kernels.append_token(caches[0], geometry, *new, lengths)
        parts = [(slice(0, 2), tokens + step)]
        writing.append_token(caches[1], geometry, *new, parts, lengths)
        lengths += 1
    completed = torch.tensor([3 * residual, 3 * residual - 1], dtype=torch.int32, device=DEVICE)
    for cache, module in zip(caches, (kernels, steps), strict=True):
        cache.key_rest.copy_(draw(7, 2, 2, residual, dim, dtype))
        module.flush_keys(cache, geometry, completed, channels)
    assert caches[1].key_scale[0, :, -1].count_nonzero()
    pairs = zip(caches[0].tensors().items(), caches[1].tensors().values(), strict=True)
    kind = {2: torch.int16, 4: torch.int32}
    return [
        name
        for (name, one), other in pairs
        if not torch.equal(*(x.view(kind[x.element_size()]) for x in (one, other)))
    ]


def attentions():
    """Yield (name, errors) for layouts, head sizes, groups, types, lengths and channels."""
    cases = [
        (Geometry(2, 32, 32), 1, 32, (70, 33), HALF, {}),
        (Geometry(2, 32, 32), 4, 64, (32, 5), BRAIN, {"held": 1}),
        (Geometry(4, 32, 32), 3, 32, (65, 31), HALF, {"queries": 7}),
        (Geometry(4, 32, 64), 2, 96, (130, 64), HALF, {"held": 1}),
        (Geometry(2, 32, 64), 8, 64, (130, 128), BRAIN, {}),
        (Geometry(2, 32, 128), 4, 128, (300, 129), HALF, {"splits": 3}),
        (Geometry(2, 64, 128), 1, 64, (257,), HALF, {}),
        (Geometry(4, 64, 64), 2, 128, (130,), HALF, {"held": 1, "queries": 9}),
        (Geometry(2, 32, 64), 2, 64, (150, 64), HALF, {"cut": 32}),
        (Geometry(4, 32, 32), 1, 96, (70,), BRAIN, {"cut": 48}),
    ]
    for geometry, group, dim, lengths, dtype, more in cases:
        name = f"{geometry} G={group} D={dim} {lengths} {dtype} {more}"
        yield name, attention(geometry, group, dim, lengths, dtype, **more)


def turns():
    """Yield (name, errors) of float16 answers to one query, to turns of 9 and of many queries.

    A short row stands beside a longer one. On a GPU all combinations run, in the interpreter every
    pair of choices but many queries with many heads or with large layouts, of which one is enough.
    Turns get queries of twice the usual size: a single query's products with the scales are kept in
    one half, whose rounding grows with logits.
    """
    layouts = [(32, 64), (64, 64), (32, 128), (64, 128), (128, 128)]
    heads, lengths = (1, 4, 8), (300, 40)
    for (at, (g, dim)), bits, group, queries in itertools.product(
        enumerate(layouts), (2, 4), heads, (1, 9, MANY)
    ):
        large = (g, dim) in ((32, 128), (64, 128))
        if DEVICE == "cpu" and queries == MANY and (group > 1 or large or bits == (2, 4)[at % 2]):
            continue
        if DEVICE == "cpu" and queries < MANY and group != heads[(at + queries) % 3]:
            continue
        yield f"{bits} bits g={g} D={dim} G={group} Q={queries}", attention(
            Geometry(bits, g, 128), group, dim, lengths, HALF, queries=queries, kv_heads=1,
            size=1 if queries == 1 else 2, offset=8, result=HALF,
        )  # fmt: skip
    more = {"kv_heads": 1, "size": 2, "offset": 8, "result": HALF}
    for geometry, group, queries in (
        (Geometry(4, 64, 128), 4, MANY), (Geometry(2, 32, 32), 8, 9), (Geometry(4, 32, 32), 1, 70),
    ):  # fmt: skip
        yield (
            f"{geometry} G={group} Q={queries}",
            attention(geometry, group, 64, lengths, HALF, queries=queries, **more),
        )


def packings():
    """Yield (name, tensors that differ)."""
    for geometry, dim, dtype, cut in (
        (Geometry(2, 32, 32), 32, FULL, None), (Geometry(4, 32, 64), 96, BRAIN, 48),
        (Geometry(2, 64, 128), 64, HALF, None), (Geometry(4, 32, 32), 64, HALF, 16),
    ):  # fmt: skip
        yield f"{geometry} D={dim} {dtype} cut={cut}", packing(geometry, dim, dtype, cut)


found = {"attention": attentions(), "turns": turns(), "packing": packings()}
print(json.dumps({name: dict(items) for name, items in found.items()}))
