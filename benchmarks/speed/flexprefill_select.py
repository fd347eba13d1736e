"""Check and time FlexPrefill's selection on a GPU, one Llama-3.1-8B layer (Hq 32, Hkv 8, D 128).

The kernels' lists are compared with plain torch first. Then every stage is timed, with no head and
with every head query-aware, and the variants of each kernel, with every head query-aware. Run it
from the repository's root:

    python benchmarks/speed/flexprefill_select.py --lengths 32768 131072 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from flexprefill_stages import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    attempt,
    compat_variants,
    exact_variants,
    planted,
    time_compat,
    time_each,
    time_variants,
)
from measure import environment, milliseconds, replayed_microseconds
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, density, mask_from_lists
from kvdock.policy import AttentionParams
from kvdock_flexprefill import launch
from kvdock_flexprefill.launch import Problem
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import find_pattern, last_block_shares
from kvdock_flexprefill.selection import select, select_reference


def main() -> None:
    """Check first, then time; print tables and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {
        "environment": environment(triton=triton.__version__), "checks": check(args.mode),
        "times": [], "variants": [],
    }  # fmt: skip
    for length in args.lengths:
        record["times"] += attempt(f"stages {length}", time_stages, length, args.mode) or []
    variants = compat_variants if args.mode == "compat" else exact_variants
    for length in args.lengths if args.variants else ():
        made = attempt(
            f"variants {length}", lambda n=length: time_variants(n, *variants(n), args.kernels)
        )
        record["variants"] += made or []
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    if not all(row["right"] for row in record["checks"]):
        raise SystemExit("the kernels' lists are not those of plain torch: do not use the times")


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
    print(f"{'T':>8} {'tau':>5} {'aware':>5} {'density':>8} stages in ms; whole; host; device ms")
    for tau in (0.0, 0.1, 1.0):
        options = FlexPrefillOptions(tau=tau, dense_below=0, mode=mode)
        problem = Problem(q, k, params.scaling, options)
        stages = (time_compat if mode == "compat" else time_each)(problem)
        lists = select(q, k, params, options)
        whole = milliseconds(lambda o=options: select(q, k, params, o), repeats=20)
        aware = int(launch.pattern(q, k, params.scaling, options).aware.sum())
        share = density(lists, length, length).mean().item()
        host = host_milliseconds(lambda o=options: select(q, k, params, o))
        # as the device runs it when the host is ahead, which a prefill's attention keeps it
        device = replayed_microseconds(lambda o=options: select(q, k, params, o), 20) / 1e3
        rows.append(
            {"length": length, "tau": tau, "aware": aware, "density": share, "whole": whole,
             "host": host, "device": device, **stages}
        )  # fmt: skip
        listing = "  ".join(f"{name} {ms:.3f}" for name, ms in stages.items())
        totals = "; ".join(f"{ms:.3f}" for ms in (whole, host, device))
        print(
            f"{length:>8} {tau:5.2f} {aware:5d} {share:8.3f} {listing}; {totals}",
            flush=True,
        )
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
    parser.add_argument("--variants", action="store_true", help="time the kernels' variants too")
    parser.add_argument("--kernels", nargs="+", help="time variants of these alone")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
