"""The stages of FlexPrefill's selection and the variants of its kernels, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import milliseconds
from torch import Tensor

from kvdock_flexprefill import compat, launch
from kvdock_flexprefill.launch import DEFAULT, Problem
from kvdock_flexprefill.options import FlexPrefillOptions

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LEVELS = [
    {"warps": warps, "stages": stages, "registers": registers, "programs": programs}
    for warps, stages, registers in (
        (4, 1, None), (4, 2, None), (4, 3, None), (8, 1, None), (8, 1, 128), (8, 2, None),
        (8, 2, 128), (8, 3, None), (8, 4, None),
    )
    for programs in (132, 264, 528)
]  # fmt: skip
DECIDE = [{"decide_warps": warps, "chunk": chunk} for warps in (4, 8, 16) for chunk in (16, 32, 64)]
EMIT = [{"emit_columns": columns} for columns in (64, 128, 256, 512, 1024)]
POOL = [{"pool_warps": warps} for warps in (1, 2, 4, 8)]
SCORES = [{"score_tile": size} for size in (32, 64, 128)]
MASSES = [
    {
        "mass_parts": parts, "mass_warps": warps, "mass_stages": stages,
        "mass_programs": programs, "mass_registers": registers,
    }
    for parts, warps, registers in ((2, 4, None), (1, 4, None), (1, 4, 160), (2, 8, None))
    for stages in (2, 3)
    for programs in (264, 396, 528)
]  # fmt: skip
CHOOSE = [
    {"entries": entries, "entry_warps": warps} for entries in (4096, 8192) for warps in (8, 16, 32)
]
EDGES = [
    {"entries": entries, "edge_warps": warps} for entries in (4096, 8192) for warps in (8, 16, 32)
]
SHARES = [
    {"share_rows": rows, "score_tile": columns}
    for rows in (16, 32, 64)
    for columns in (32, 64, 128)
]


def attempt(what: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``run`` returns; print and pass over its failure."""
    try:
        return run(*arguments)
    except Exception as error:  # one length or variant must not cost the others
        print(f"{what}: failed: {type(error).__name__}: {str(error)[:160]}", flush=True)
        return None


def planted(
    heads: int, kv_heads: int, q: int, n: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return states with a sink, heavy keys and a slash, sharper head by head, as a model's views.

    The first key/value heads are nearly flat, so that their query heads are query-aware.
    """
    generator = torch.Generator("cuda").manual_seed(n + head_dim)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    sharp = torch.linspace(0.1, 1.5, kv_heads, device="cuda")[:, None]
    common = noise(1, 1, kv_heads, head_dim)
    key = noise(1, n, kv_heads, head_dim)
    key[:, :: max(2, n // 60)] += sharp * common
    key[:, 0] += 2 * sharp * common[:, 0]
    group = heads // kv_heads
    query = noise(1, q, heads, head_dim) + (sharp * common).repeat_interleave(group, 2)
    past = key.roll(192, 1)[:, n - q :].repeat_interleave(group, 2)  # one and a half blocks back
    query = query * sharp.repeat_interleave(group, 0) + past * sharp.repeat_interleave(group, 0)
    return query.to(dtype).transpose(1, 2), key.to(dtype).transpose(1, 2)


def time_each(problem: Problem) -> dict[str, float]:
    """Return the milliseconds of each stage."""
    level, mean = launch.block_levels(problem)
    chosen, aware = launch.decide(problem, level, mean)
    index = launch.new_index(problem)
    stages: dict[str, Callable[[], Any]] = {
        "levels": lambda: launch.block_levels(problem),
        "decide": lambda: launch.decide(problem, level, mean),
    }
    if problem.options.tau > 0:
        means = launch.pool(problem, aware)
        stages["pool"] = lambda: launch.pool(problem, aware)
        stages["scores"] = lambda: launch.row_logits(problem, *means, aware, index)
    times = {name: milliseconds(run, repeats=20) for name, run in stages.items()}
    if problem.options.tau > 0:  # the lists are written over the scores
        launch.row_logits(problem, *means, aware, index)
    times["emit"] = milliseconds(lambda: launch.emit(problem, chosen, aware, index), repeats=20)
    return times


def time_compat(problem: Problem) -> dict[str, float]:
    """Return the milliseconds of each stage of compat mode.

    Repeated, they join offsets that were joined, at the same cost.
    """
    return {name: milliseconds(run, repeats=20) for name, run in compat_stages(problem).items()}


def compat_stages(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return the stages of compat mode, each fed with what those before it left."""
    level, mean = compat.levels(problem)
    mass = compat.masses(problem, level)
    chosen, aware, *_ = compat.choose(problem, *mass, mean)
    stages: dict[str, Callable[[], Any]] = {
        "levels": lambda: compat.levels(problem),
        "masses": lambda: compat.masses(problem, level),
        "choose": lambda: compat.choose(problem, *mass, mean),
    }
    if problem.options.tau == 0:
        stages["emit"] = lambda: compat.emit(problem, chosen, aware)
        return stages
    means = launch.pool(problem, aware)
    shares = compat.row_shares(problem, *means, aware)
    edges = compat.find_edges(problem, aware, shares)
    return stages | {
        "pool": lambda: launch.pool(problem, aware),
        "shares": lambda: compat.row_shares(problem, *means, aware),
        "edges": lambda: compat.find_edges(problem, aware, shares),
        "emit": lambda: compat.emit(problem, chosen, aware, shares, edges),
    }


Variants = list[tuple[str, list[dict[str, Any]], Callable[[Problem], Any], float]]
"""Name, variants, run, and milliseconds that are not the kernel's."""


def exact_variants(length: int) -> tuple[Problem, Variants]:
    """Return what varies in exact mode."""
    base = aware_problem(length, "exact")
    level, mean = launch.block_levels(base)
    chosen, aware = launch.decide(base, level, mean)
    means, index = launch.pool(base, aware), launch.new_index(base)
    launch.row_logits(base, *means, aware, index)
    scores = index.clone()

    def emit(problem: Problem) -> None:
        index.copy_(scores)
        launch.emit(problem, chosen, aware, index)

    copying = milliseconds(lambda: index.copy_(scores))
    return base, [
        ("levels", LEVELS, launch.block_levels, 0.0),
        ("decide", DECIDE, lambda p: launch.decide(p, level, mean), 0.0),
        ("pool", POOL, lambda p: launch.pool(p, aware), 0.0),
        ("scores", SCORES, lambda p: launch.row_logits(p, *means, aware, index), 0.0),
        ("emit", EMIT, emit, copying),
    ]


def compat_variants(length: int) -> tuple[Problem, Variants]:
    """Return what varies in compat mode; the searches use masses as the default left them."""
    base = aware_problem(length, "compat")
    level, mean = compat.levels(base)
    mass = compat.masses(base, level)
    chosen, aware, *_ = compat.choose(base, *mass, mean)
    means = launch.pool(base, aware)
    shares = compat.row_shares(base, *means, aware)
    edges = compat.find_edges(base, aware, shares)
    return base, [
        ("levels", LEVELS, compat.levels, 0.0),
        ("masses", MASSES, lambda p: compat.masses(p, level), 0.0),
        ("choose", CHOOSE, lambda p: compat.choose(p, *mass, mean), 0.0),
        ("shares", SHARES, lambda p: compat.row_shares(p, *means, aware), 0.0),
        ("edges", EDGES, lambda p: compat.find_edges(p, aware, shares), 0.0),
        ("emit", EMIT, lambda p: compat.emit(p, chosen, aware, shares, edges), 0.0),
    ]


def aware_problem(length: int, mode: str) -> Problem:
    """Return a problem in which every head is query-aware, as far as the mode allows."""
    q, k = planted(HEADS, KV_HEADS, length, length, HEAD_DIM, torch.bfloat16)
    options = FlexPrefillOptions(tau=1.0, dense_below=0, mode=mode)
    return Problem(q, k, HEAD_DIM**-0.5, options)


def time_variants(
    length: int, base: Problem, kernels: Variants, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """Time the variants of every kernel, or of the named ones."""
    rows = []
    for name, variants, run, overhead in kernels:
        if names is not None and name not in names:
            continue
        timed = []
        for changes in variants:
            problem = replace(base, tuning=replace(DEFAULT, **changes))
            ms = attempt(f"{name} {changes}", milliseconds, lambda p=problem, r=run: r(p))
            if ms is not None:
                timed.append((ms - overhead, changes))
        timed.sort(key=lambda pair: pair[0])
        for ms, changes in timed[:6]:
            print(f"{length:>8} {name:<8} {ms:7.3f} ms {changes}", flush=True)
        rows += [{"length": length, "kernel": name, "ms": ms, **c} for ms, c in timed]
    return rows
