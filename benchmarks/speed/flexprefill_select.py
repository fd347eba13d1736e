"""Check and time FlexPrefill's selection on a GPU, one Llama-3.1-8B layer (Hq 32, Hkv 8, D 128).

The kernels' lists are compared with plain torch first. Then every stage is timed, with no head and
with every head query-aware, and the variants of each kernel. Run it from the repository's root:

    python benchmarks/speed/flexprefill_select.py --lengths 32768 131072 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from measure import environment, milliseconds
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, density, mask_from_lists
from kvdock.policy import AttentionParams
from kvdock_flexprefill import compat, launch
from kvdock_flexprefill.launch import DEFAULT, Problem
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import find_pattern, last_block_shares
from kvdock_flexprefill.selection import select, select_reference

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


def main() -> None:
    """Check first, then time; print tables and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {
        "environment": environment(triton=triton.__version__), "checks": check(args.mode),
        "times": [], "variants": [],
    }  # fmt: skip
    if args.variants:
        for length in args.lengths:
            record["variants"] += attempt(f"variants {length}", time_variants, length) or []
    for length in args.lengths:
        record["times"] += attempt(f"stages {length}", time_stages, length, args.mode) or []
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    if not all(row["right"] for row in record["checks"]):
        raise SystemExit("the kernels' lists are not those of plain torch: do not use the times")


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


def check(mode: str) -> list[dict[str, Any]]:
    """Compare lists and covered mass with plain torch."""
    cases: list[tuple[Any, ...]] = [
        (8, 2, n, n, head_dim, dtype, 0.1)
        for head_dim in (64, 128)
        for dtype in (torch.float16, torch.bfloat16)
        for n in (1000, 4097, 32_768)
    ]
    cases += [
        (32, 8, 4097, 4097, 128, torch.bfloat16, 0.0),
        (32, 8, 4097, 4097, 128, torch.bfloat16, 1.0),
        (8, 8, 1001, 5097, 128, torch.bfloat16, 0.1),
        (7, 1, 2048, 4000, 96, torch.bfloat16, 1.0),
    ]
    rows = []
    print(f"{'case':>48} aware apart V/S/aware  blocks of      rows  density  covered  reference")
    for case in cases:
        *shape, tau = case
        q, k = planted(*shape)
        options = FlexPrefillOptions(tau=tau, min_budget=128, dense_below=0, mode=mode)
        row = attempt(str(case), compare, q, k, options) or {"right": False}
        rows.append({"case": str(case), **row})
        if len(row) == 1:
            continue
        name = f"{case[:5]} {case[5]} tau {tau}".replace("torch.", "")
        print(
            f"{name:>48} {row['aware']:5d} {row['vertical']:4d}/{row['slash']}/{row['kind']}"
            f" {row['blocks']:12d} {row['listed']:9d} {row['rows']:6d} {row['density']:8.3f}"
            f" {row['covered']:8.4f} {row['reference']:8.4f}",
            flush=True,
        )
        rows[-1]["right"] = row["right"] = (
            row["blocks"] <= 0.002 * row["listed"] + 2
            and row["sorted"]
            and row["same"]
            and (tau > 0 or mode == "compat" or row["covered"] > options.gamma - 1e-3)
        )
        if not row["right"]:
            print(f"WRONG: {row}", flush=True)
    return rows


def compare(q: Tensor, k: Tensor, options: FlexPrefillOptions) -> dict[str, Any]:
    """Count what differs between kernels and plain torch, and what the last queries find."""
    params = AttentionParams(q.shape[-1] ** -0.5)
    grid = BlockGrid(q.shape[2], k.shape[2], options.block)
    lists = launch.select(q, k, params.scaling, options)
    again = launch.select(q, k, params.scaling, options)
    found = mask_from_lists(lists, grid.key_blocks)
    wanted = mask_from_lists(select_reference(q, k, params, options), grid.key_blocks)
    pattern = launch.pattern(q, k, params.scaling, options)
    exact = find_pattern(q.float(), k.float(), params.scaling, options)
    apart = found != wanted
    entry = torch.arange(grid.key_blocks, device=q.device)
    rising = (lists.index.diff(dim=-1) > 0) | (entry[1:] >= lists.count[..., None])
    shares = last_block_shares(q.float(), k.float(), params.scaling, options.block)
    covered = [(shares * mask[:, :, -1]).sum(-1).min().item() for mask in (found, wanted)]
    return {
        "aware": int(exact.aware.sum()), "vertical": int((pattern.vertical ^ exact.vertical).sum()),
        "slash": int((pattern.slash ^ exact.slash).sum()),
        "kind": int((pattern.aware ^ exact.aware).sum()), "blocks": int(apart.sum()),
        "rows": int(apart.any(-1).sum()), "listed": int(wanted.sum()),
        "density": density(lists, grid.queries, grid.keys).mean().item(),
        "covered": covered[0], "reference": covered[1], "sorted": bool(rising.all()),
        "same": torch.equal(lists.count, again.count) and torch.equal(lists.index, again.index),
    }  # fmt: skip


def time_stages(length: int, mode: str) -> list[dict[str, Any]]:
    """Time every stage and the whole, for no, some and only query-aware heads."""
    q, k = planted(HEADS, KV_HEADS, length, length, HEAD_DIM, torch.bfloat16)
    params, rows = AttentionParams(HEAD_DIM**-0.5), []
    print(f"{'T':>8} {'tau':>5} {'aware':>5} {'density':>8} stages in ms; whole; host ms")
    for tau in (0.0, 0.1, 1.0):
        options = FlexPrefillOptions(tau=tau, dense_below=0, mode=mode)
        problem = Problem(q, k, params.scaling, options)
        stages = (time_compat if mode == "compat" else time_each)(problem)
        lists = select(q, k, params, options)
        whole = milliseconds(lambda o=options: select(q, k, params, o), repeats=20)
        aware = int(launch.pattern(q, k, params.scaling, options).aware.sum())
        share = density(lists, length, length).mean().item()
        host = host_milliseconds(lambda o=options: select(q, k, params, o))
        rows.append(
            {"length": length, "tau": tau, "aware": aware, "density": share, "whole": whole,
             "host": host, **stages}
        )  # fmt: skip
        listing = "  ".join(f"{name} {ms:.3f}" for name, ms in stages.items())
        print(
            f"{length:>8} {tau:5.2f} {aware:5d} {share:8.3f} {listing}; {whole:.3f}; {host:.3f}",
            flush=True,
        )
    return rows


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

    Repeated, they join offsets that were joined and take shares of shares, at the same cost.
    """
    level, mean = launch.block_levels(problem)
    mass = compat.masses(problem, level)
    counted = compat.count(problem, mass)
    chosen, aware = compat.choose(problem, *counted, mean)
    index, edges = launch.new_index(problem), compat.new_edges(problem)
    stages: dict[str, Callable[[], Any]] = {
        "levels": lambda: launch.block_levels(problem),
        "masses": lambda: compat.masses(problem, level),
        "count": lambda: compat.count(problem, mass),
        "choose": lambda: compat.choose(problem, *counted, mean),
    }
    if problem.options.tau > 0:
        means = launch.pool(problem, aware)
        stages["pool"] = lambda: launch.pool(problem, aware)
        stages["scores"] = lambda: launch.row_logits(problem, *means, aware, index)
        stages["edges"] = lambda: compat.find_edges(problem, aware, index, edges)
    stages["emit"] = lambda: compat.emit(problem, chosen, aware, index, edges)
    return {name: milliseconds(run, repeats=20) for name, run in stages.items()}


def time_variants(length: int) -> list[dict[str, Any]]:
    """Time the variants of every kernel, every head being query-aware."""
    q, k = planted(HEADS, KV_HEADS, length, length, HEAD_DIM, torch.bfloat16)
    options = FlexPrefillOptions(tau=1.0, dense_below=0)
    base = Problem(q, k, HEAD_DIM**-0.5, options)
    level, mean = launch.block_levels(base)
    chosen, aware = launch.decide(base, level, mean)
    means, index = launch.pool(base, aware), launch.new_index(base)
    launch.row_logits(base, *means, aware, index)
    scores = index.clone()

    def emit(problem: Problem) -> None:
        index.copy_(scores)
        launch.emit(problem, chosen, aware, index)

    copying = milliseconds(lambda: index.copy_(scores))
    kernels: list[tuple[str, list[dict[str, Any]], Callable[[Problem], Any], float]] = [
        ("levels", LEVELS, launch.block_levels, 0.0),
        ("decide", DECIDE, lambda p: launch.decide(p, level, mean), 0.0),
        ("pool", POOL, lambda p: launch.pool(p, aware), 0.0),
        ("scores", SCORES, lambda p: launch.row_logits(p, *means, aware, index), 0.0),
        ("emit", EMIT, emit, copying),
    ]
    rows = []
    for name, variants, run, overhead in kernels:
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


def host_milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the mean time a call keeps the host, the device not waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / repeats * 1e3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 65_536, 131_072])
    parser.add_argument("--mode", choices=("exact", "compat"), default="exact")
    parser.add_argument("--variants", action="store_true", help="time exact's variants too")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
