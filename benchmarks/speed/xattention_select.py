"""Check and time XAttention's selection on a GPU, one Llama-3.1-8B layer (Hq 32, Hkv 8, D 128).

The kernels are compared with plain torch first, then every shape of the score kernel is timed, the
choice kernel, and the whole selection. Queries and keys are planted: a common direction under RoPE,
a sink, and one heavy key in 512. Run it from the repository's root:

    python benchmarks/speed/xattention_select.py --lengths 32768 131072 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from measure import environment
from torch import Tensor
from xattention_check import PAIR, check, check_whole, planted

from kvdock.kernels.blocks import density
from kvdock.policy import AttentionParams
from kvdock_xattention.choice_kernels import choose
from kvdock_xattention.grid import TileGrid
from kvdock_xattention.options import XAttentionOptions
from kvdock_xattention.pipeline import (
    LEVEL_BYTES,
    LOG2E,
    default_shape,
    level_row,
    parts,
    select_by_kernels,
)
from kvdock_xattention.score import Shape, score
from kvdock_xattention.select import select

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALING = HEAD_DIM**-0.5
WIDE = Shape(128, 256, 64, 8, 4, descriptors=True)
WALK = replace(WIDE, programs=1)
SHAPES = {
    "tma 128x256 w8 s4 walk": WALK,
    "tma 128x256 w8 s3 walk": replace(WALK, stages=3),
    "tma 128x256 w8 s4 walk band1": replace(WALK, band=1),
    "tma 128x256 w8 s4 walk band4": replace(WALK, band=4),
    "tma 128x256x32 w8 s6 walk": replace(WALK, inner=32, stages=6),
    "tma 256x128 w8 s4 walk": replace(WALK, queries=256, keys=128),
    "tma 128x256 w8 s4": WIDE,
    "tma 128x256 w8 s3": replace(WIDE, stages=3),
    "tma 128x256 w8 s4 band4": replace(WIDE, band=4),
    "tma 128x128 w4 s3": PAIR,
    "tma 128x128 w4 s3 band4": replace(PAIR, band=4),
    "ptr 128x256 w8 s3": replace(WIDE, descriptors=False, stages=3),
    "ptr 128x128 w4 s3": replace(PAIR, descriptors=False),
}


def main() -> None:
    """Check first, then time; print a table and write the numbers."""
    args = _arguments()
    begun = time.monotonic()
    record: dict[str, Any] = {"environment": environment(triton=triton.__version__)}
    print(record["environment"]["gpu"], flush=True)
    if not args.no_check:
        record["checks"] = check(args.check_lengths)
        record["whole"] = check_whole()
        print(f"checked after {time.monotonic() - begun:.0f} s", flush=True)
    record["times"] = []
    names = [name for name in SHAPES if not args.shapes or any(s in name for s in args.shapes)]
    for stride, length in itertools.product(args.strides, args.lengths):
        record["times"] += time_all(length, stride, names, args.repeats)
        if len(names) > args.best:  # compiling is slow: only the fastest are timed again
            names = fastest(record["times"], args.best)
        print(f"after {time.monotonic() - begun:.0f} s", flush=True)
    summary(record["times"])
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def time_all(length: int, stride: int, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """Time every shape of the score, the choice, and the selection as a model calls it."""
    q, k = planted(1, HEADS, KV_HEADS, length, HEAD_DIM, torch.bfloat16)
    grid = TileGrid(length, length, stride)
    flop = HEADS * HEAD_DIM * length * length / stride
    rows: list[dict[str, Any]] = []

    def note(what: str, run: Callable[[], Any], work: float = 0.0) -> None:
        try:
            ms, extra = measure(run, repeats)
        except Exception as error:  # a shape that does not fit this GPU
            print(f"{length:>7} S{stride:<2} {what:<34} failed: {str(error)[:120]}", flush=True)
            return
        row = {"length": length, "stride": stride, "what": what, "ms": ms, "MiB": extra}
        row["TFLOP/s"] = work / ms / 1e9
        rows.append(row)
        print(line(row), flush=True)

    def run_scores(shape: Shape) -> None:
        for part in parts(KV_HEADS, HEADS // KV_HEADS, grid, shape, LEVEL_BYTES):
            size = (part.pairs * HEADS // KV_HEADS, (part.high - part.low) * shape.queries)
            level = torch.empty(*size, level_row(grid), device="cuda")
            score(q, k, level, SCALING / stride * LOG2E, grid, part, shape)

    for name in names:
        note(f"score {name}", lambda s=SHAPES[name]: run_scores(s), flop)
    options, params = XAttentionOptions(stride=stride, threshold=0.9), AttentionParams(SCALING)
    note("select, default shape", lambda: select(q, k, params, options), flop)
    thresholds = torch.full((1,), 0.9, device="cuda")
    for size in (64, 128, 256, 1024):
        note(
            f"select, levels of {size} MiB",
            lambda n=size: select_by_kernels(q, k, SCALING, grid, thresholds, level_bytes=n << 20),
            flop,
        )
    try:
        kept = density(select(q, k, params, options), length, length).mean().item()
        print(f"{length:>7} S{stride:<2} density {kept:.3f} at threshold 0.9", flush=True)
    except Exception as error:
        print(f"density failed: {str(error)[:200]}", flush=True)
    for warps in (1, 2, 4, 8):
        note(f"choice, {warps} warps", choice(q, k, grid, warps))
    return rows


def choice(q: Tensor, k: Tensor, grid: TileGrid, warps: int) -> Callable[[], Any]:
    """Return a call that chooses for all heads, from levels of one part computed once."""
    shape = default_shape(q, k, grid)
    thresholds = torch.full((1,), 0.9, device="cuda")
    whole = list(parts(KV_HEADS, HEADS // KV_HEADS, grid, shape, LEVEL_BYTES))
    part = whole[0]
    size = (part.pairs * HEADS // KV_HEADS, (part.high - part.low) * shape.queries)
    level = torch.empty(*size, level_row(grid), device="cuda")
    lists = select_by_kernels(q, k, SCALING, grid, thresholds)
    score(q, k, level, SCALING / grid.stride * LOG2E, grid, part, shape)

    def run() -> None:
        for piece in whole:
            choose(
                level, thresholds, lists, grid, piece, shape.queries, loose=0, share=1, warps=warps
            )

    return run


def fastest(rows: list[dict[str, Any]], count: int) -> list[str]:
    """Return the names of the fastest shapes at the length measured last."""
    last = [r for r in rows if "score" in r["what"] and r["length"] == rows[-1]["length"]]
    return [r["what"].removeprefix("score ") for r in sorted(last, key=lambda r: r["ms"])][:count]


def line(row: dict[str, Any]) -> str:
    """Format one measurement."""
    rate = f"{row['TFLOP/s']:7.0f} TFLOP/s" if row["TFLOP/s"] else " " * 15
    return (
        f"{row['length']:>7} S{row['stride']:<2} {row['what']:<34} {row['ms']:9.3f} ms {rate}"
        f" {row['MiB']:7.0f} MiB"
    )


def summary(rows: list[dict[str, Any]]) -> None:
    """Print, per length and stride, the fastest score and the whole selection."""
    print("\nfastest score, and the whole selection")
    for key in sorted({(row["length"], row["stride"]) for row in rows}):
        here = [row for row in rows if (row["length"], row["stride"]) == key]
        scores = sorted((r for r in here if "score" in r["what"]), key=lambda r: r["ms"])
        for row in scores[:3] + [r for r in here if "select" in r["what"]]:
            print(line(row))


def measure(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median milliseconds and the MiB it needs beyond its inputs."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 65_536, 131_072])
    parser.add_argument("--strides", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--shapes", nargs="*", help="only shapes whose name contains one of these")
    parser.add_argument("--best", type=int, default=6, help="shapes timed after the first length")
    parser.add_argument("--check-lengths", type=int, nargs="+", default=[1000, 4097, 32_768])
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
