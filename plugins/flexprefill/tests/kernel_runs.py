"""Run the Triton kernels on small inputs and print how far they are from plain torch, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_kernels.py` runs it.
"""

import json
import os
import sys

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock.kernels.blocks import BlockGrid, mask_from_lists
from kvdock.policy import AttentionParams
from kvdock_flexprefill import compat, launch
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import find_pattern, published_count, select_reference
from kvdock_flexprefill.stages import DEFAULT, Problem, Tuning

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
NARROW = Tuning(entries=64, slots=4)
"""Let searches go round several times, as they do on long prompts."""


def draw(seed, rows, kv_heads, group, q, n, head_dim, dtype):
    """Return states as a model passes them, tokens before heads in memory; some heads are flat."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, q, kv_heads * group, head_dim, generator=generator)
    key = torch.randn(rows, n, kv_heads, head_dim, generator=generator)
    query = query * torch.linspace(0.1, 3, kv_heads * group)[:, None]
    return [x.to(DEVICE, dtype).transpose(1, 2) for x in (query, key)]


def apart(query, key, tuning=DEFAULT, **changes):
    """Count what differs from plain torch, and whether the lists are lists."""
    options = FlexPrefillOptions(**{"block": 16, "min_budget": 16, "gamma": 0.6, **changes})
    scaling = query.shape[-1] ** -0.5
    blocks = BlockGrid(query.shape[2], key.shape[2], options.block).key_blocks
    lists = launch.select(query, key, scaling, options, tuning)
    wanted = select_reference(query, key, AttentionParams(scaling), options)
    pattern = find_pattern(query.float(), key.float(), scaling, options)
    entry = torch.arange(blocks, device=DEVICE)
    rising = (lists.index.diff(dim=-1) > 0) | (entry[1:] >= lists.count[..., None])
    found = mask_from_lists(lists, blocks)
    return {
        "blocks": int((found ^ mask_from_lists(wanted, blocks)).sum()),
        "aware": int(pattern.aware.sum()),
        "heads": pattern.aware.numel(),
        "listed": int(wanted.count.sum()),
        "ascending": bool(rising.all()),
        "permutation": bool((lists.index.sort(-1).values == entry).all()),
    }


def runs():
    """Yield (name, outcome) for data types, head dims, groups, chunks and kinds of heads."""
    small = {"rows": 1, "kv_heads": 1, "group": 2, "q": 90, "n": 90, "head_dim": 16}
    cases = {
        "float32": {**small, "dtype": torch.float32},
        "float16 D=96": {**small, "dtype": torch.float16, "head_dim": 96},
        "bfloat16 D=64": {**small, "dtype": torch.bfloat16, "head_dim": 64},
        "two rows, heads alone": {
            **small, "rows": 2, "kv_heads": 2, "group": 1, "dtype": torch.float32,
        },
        "chunk inside blocks": {**small, "q": 21, "n": 75, "dtype": torch.float32},
        "chunk shorter than a block": {**small, "q": 5, "n": 37, "dtype": torch.float32},
    }  # fmt: skip
    for seed, (name, case) in enumerate(cases.items()):
        yield name, apart(*draw(seed, **case), tau=0.12)
    float32 = {**small, "dtype": torch.float32}
    yield "no head is query-aware", apart(*draw(7, **float32), tau=0.0)
    yield "all heads are query-aware", apart(*draw(8, **float32), tau=1.0)
    yield "most", apart(*draw(9, **{**float32, "q": 120, "n": 120}), tau=0.0, max_budget=32)
    query, key = draw(10, **{**float32, "q": 70, "n": 70})
    yield "equal keys", apart(query, torch.full_like(key, 0.5), tau=1.0, gamma=0.45)
    compat = {"mode": "compat", "gamma": 0.6}
    half = {**small, "rows": 2, "q": 50, "n": 50, "head_dim": 24, "dtype": torch.float16}
    yield "compat, two rows, D=24", apart(*draw(11, **half), tau=0.1, **compat)
    chunk = cases["chunk inside blocks"]
    yield "compat, chunk inside blocks", apart(*draw(12, **chunk), tau=1.0, **compat)
    short = cases["chunk shorter than a block"]
    yield "compat, chunk shorter than a block", apart(*draw(13, **short), tau=1.0, **compat)
    long = {**float32, "q": 280, "n": 300}
    yield "compat, hundreds of tokens", apart(*draw(14, **long), tau=0.0, **compat)
    wide = {**compat, "block": 64, "min_budget": 64, "max_budget": 128}
    yield "compat, offsets in three parts", apart(*draw(15, **long), tau=0.15, **wide)
    equal = apart(query, torch.full_like(key, 0.5), tau=1.0, **{**compat, "gamma": 0.45})
    yield "compat, equal keys", equal
    yield "compat, long searches", apart(*draw(16, **half), NARROW, tau=1.0, **compat)
    yield "compat, long searches, offsets", apart(*draw(17, **long), NARROW, tau=0.0, **compat)
    ties = apart(query, torch.full_like(key, 0.5), NARROW, tau=1.0, **{**compat, "gamma": 0.45})
    yield "compat, long searches, equal keys", ties
    chunk = {**float32, "q": 200, "n": 450}
    yield "compat, masses", masses_apart(*draw(20, **chunk), DEFAULT)
    yield (
        "compat, masses, narrow tiles, few queries",
        masses_apart(*draw(21, **{**chunk, "q": 100}), Tuning(mass_parts=1, mass_programs=8)),
    )
    yield "compat, counts", counts(DEFAULT, 0.5, 0.8, 0.875)
    yield "compat, counts by long searches", counts(Tuning(slots=2), 0.75)


def masses_apart(query, key, tuning):
    """Count the masses of tokens and offsets that are not those of all probabilities."""
    options, scaling = FlexPrefillOptions(mode="compat"), query.shape[-1] ** -0.5
    problem = Problem(query, key, scaling, options, tuning)
    mass, seams, span = compat.masses(problem, compat.levels(problem)[0])
    (pairs, blocks, block), n = mass.shape[1:], key.shape[2]
    tokens, offsets = mass.flatten(2)
    for part in range(seams.shape[1] - 1):
        end = blocks * block - (part + 1) * span
        begin = max(0, end - block)
        offsets[:, begin:end] += seams[:, part, begin - end :]
    r = min(block, query.shape[2])
    scores = query[:, :, -r:].double() @ key.double().transpose(2, 3) * scaling
    q, k = torch.arange(n - r, n, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)
    share = scores.masked_fill(k > q, float("-inf")).softmax(-1).flatten(0, 1) / r
    place = (q - k + blocks * block - n).clamp_min(0).expand(pairs, -1, -1)
    by_offset = share.new_zeros(pairs, blocks * block).scatter_add_(
        1, place.flatten(1), share.flatten(1)
    )
    apart = [
        int(((found - wanted).abs() > 1e-6).sum())
        for found, wanted in ((tokens[:, :n], share.sum(1)), (offsets, by_offset))
    ]
    return {"blocks": sum(apart), "listed": n, "aware": 0, "heads": 0} | {
        "ascending": seams.shape[1] > 1, "permutation": True,
    }  # fmt: skip


def counts(tuning, *gammas):
    """Count, with ties, where the share is met just so, and what never reaches it."""
    tables = (
        [0.5, 0.3, 0.15, 0.05], [0.5, 0.25, 0.15, 0.1], [0.125] * 8, [0.0, 0.75, 0.0, 0.125],
        [0.25, 0.0625, 0.25, 0.0625, 0.25, 0.125],
    )  # fmt: skip
    mass = torch.zeros(2, len(tables), 2, 16, device=DEVICE)
    for pair, table in enumerate(tables):
        mass[0, pair, 0, : len(table)] = mass[1, pair, 0, : len(table)] = torch.tensor(table)
    seams = mass.new_zeros(len(tables), 2, 16)
    seams[:, 0] = mass[1, :, 0] / 2
    apart = seen = 0
    states = torch.zeros(1, len(tables), 32, 16, device=DEVICE)
    for gamma in gammas:
        options = FlexPrefillOptions(block=16, gamma=gamma)
        problem = Problem(states, states, 1.0, options, tuning)
        parts = mass.clone()
        parts[1, :, 0] /= 2  # the other half is the first program's
        means = parts.new_zeros(len(tables), 2)
        _, _, sums, found = compat.choose(problem, parts, seams, 16, means)
        wanted = published_count(mass.flatten(2), gamma)
        apart += int((found != wanted).sum() + (sums != mass.sum(-1)).sum())
        seen += int(wanted.sum())
    return {"blocks": apart, "listed": seen, "aware": 0, "heads": 0} | {
        "ascending": True, "permutation": True,
    }  # fmt: skip


print(json.dumps(dict(runs())))
