"""Say where the time of a captured decode step goes, on the Llama-3.1-8B shape.

Sections:

    steps    every kernel of a replayed step by name: calls, time, share; and the gaps between them
    linear   the model's matrix products at 1, 8 and 32 rows: cuBLAS beside candidates in Triton

    python benchmarks/speed/decode_profile.py steps linear --out RESULTS.json
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from baseline import llama_8b
from gemv import DOT, FMA, compile_one, linear
from measure import COLD, cold_microseconds, environment
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kvdock

SHAPES = {
    "q, o": (4096, 4096), "k, v": (1024, 4096), "q+k+v": (6144, 4096),
    "gate, up": (14_336, 4096), "down": (4096, 14_336), "head": (128_256, 4096),
}  # fmt: skip
STEPS = 10


def main() -> None:
    """Run the sections asked for and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {"environment": environment()}
    bandwidth = record["environment"]["copy_tb_per_s"]
    print(f"{record['environment']['gpu']}, copy {bandwidth} TB/s", flush=True)
    if "steps" in args.sections:
        record["steps"] = steps(args)
    gc.collect()
    torch.cuda.empty_cache()
    if "linear" in args.sections:
        record["linear"] = products(args.batches, bandwidth)
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Profile captured steps of one method at every batch."""
    model = llama_8b(args.layers)
    found = []
    for batch in args.batches:
        prompt = torch.randint(10, 120_000, (batch, args.length), device="cuda")
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        with kvdock.attach(
            model, args.method, budget=args.budget, graph=False if args.eager else "auto"
        ):
            for _ in range(2):  # the first run compiles and warms up
                with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                    model.generate(**inputs, max_new_tokens=STEPS + 12, do_sample=False)
                    torch.cuda.synchronize()
        row = _summary(profiler, batch)
        found.append(row)
        torch.cuda.empty_cache()
    return found


def _summary(profiler: profile, batch: int) -> dict[str, Any]:
    """Add up the kernels of the last steps, which end with an argmax each, and print a table."""
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if e.device_type == DeviceType.CUDA and e.time_range.end > e.time_range.start
    )
    ends = [start for start, _, name in kernels if "argmax" in name.lower()]
    if len(ends) <= STEPS:
        print(f"B={batch}: only {len(ends)} steps among {len(kernels)} kernels; cannot be cut")
        return {"batch": batch, "kernels": len(kernels)}
    begin, end = ends[-STEPS - 1], ends[-1]
    times: dict[str, list[float]] = defaultdict(list)
    for start, stop, name in kernels:
        if begin <= start < end:
            times[name].append(stop - start)
    wall, busy = (end - begin) / STEPS, sum(map(sum, times.values())) / STEPS
    count = sum(map(len, times.values())) / STEPS
    print(
        f"\nB={batch}: {wall:.0f} us a step, kernels busy {busy:.0f} us, {count:.0f} kernels",
        flush=True,
    )
    rows = []
    for name, spent in sorted(times.items(), key=lambda item: -sum(item[1])):
        row = {"name": name, "calls": len(spent) / STEPS, "us": sum(spent) / STEPS}
        rows.append(row)
        if len(rows) <= 28:
            print(f"{row['calls']:7.1f} x {sum(spent) / len(spent):7.2f} = {row['us']:8.1f} us"
                  f" {row['us'] / wall:6.1%}  {name[:110]}", flush=True)  # fmt: skip
    return {"batch": batch, "step_us": wall, "busy_us": busy, "kernels": count, "by_name": rows}


def products(batches: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Time the matrix products of a step over weights that are in no cache."""
    started = time.perf_counter()
    jobs = [(cut, rows) for rows in batches for cut in (FMA if rows == 1 else []) + DOT]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for (cut, rows), text in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if text:
                print(f"{cut} M={rows}: {text[:200]}", flush=True)
    print(f"\ncompiled {len(jobs)} variants in {time.perf_counter() - started:.0f} s", flush=True)
    rows_found = []
    for (name, (outputs, inputs)), rows in [(s, b) for s in SHAPES.items() for b in batches]:
        size = outputs * inputs * 2
        copies = max(1, -(-COLD // size))
        weights = [
            torch.empty(outputs, inputs, device="cuda", dtype=torch.bfloat16).normal_()
            for _ in range(copies)
        ]
        states = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        calls: dict[str, Any] = {"cublas": lambda w, x=states: F.linear(x, w)}
        for cut in (FMA if rows == 1 else []) + DOT:
            calls[str(cut)] = lambda w, x=states, c=cut: linear(x, w, c)
        floor = size / bandwidth / 1e6
        here = []
        for what, call in calls.items():
            try:
                us = cold_microseconds([lambda w=w, c=call: c(w) for w in weights], 5.0)
            except Exception as error:
                print(f"{name} M={rows} {what}: {type(error).__name__}: {error}"[:200], flush=True)
                continue
            here.append(
                {"shape": name, "rows": rows, "what": what, "us": us, "of_floor": floor / us}
            )
        rows_found += here
        best = sorted(here[1:], key=lambda row: row["us"])[:3]
        line = "; ".join(f"{r['what']} {r['us']:.1f} ({r['of_floor']:.0%})" for r in best)
        print(f"{name:>9} {outputs}x{inputs} M={rows:<2} floor {floor:6.1f} us, cublas"
              f" {here[0]['us']:6.1f} ({here[0]['of_floor']:.0%}); {line}", flush=True)  # fmt: skip
    return rows_found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=["steps", "linear"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=2304)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="snapkv")
    parser.add_argument(
        "--graph", default="auto", type=lambda text: {"False": False}.get(text, text)
    )
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
