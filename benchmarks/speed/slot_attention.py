"""Check and time decode attention over slots of fixed number, one Llama-3.1-8B layer, bfloat16.

Query heads 32, key/value heads 8, D 128. Correctness first, then every tuning of the kernel beside
torch's attention over the exact length and over all slots through a mask. Every call is timed in a
CUDA graph that goes over enough copies of the cache to find none of it in the second-level cache,
as in a model, where the weights pass between two layers. Run it from the repository's root:

    python benchmarks/speed/slot_attention.py --out RESULTS.json
    python benchmarks/speed/slot_attention.py --check
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from measure import COLD, cold_microseconds, environment
from slot_cases import DIM, HEADS, KV_HEADS, PARAMS, check, difference, draw
from torch import Tensor

from kvdock.kernels import slots
from kvdock.kernels.decode import attend_slots, without_plans
from kvdock.kernels.slots_triton import Tuning, attend, default_tuning

CUTS = [
    (32, 2, 3), (32, 4, 3), (32, 1, 3), (32, 2, 4), (64, 2, 2), (64, 2, 3), (64, 4, 2), (64, 4, 3),
    (64, 4, 4), (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3),
]  # fmt: skip
SHARES = (1, 2, 4, 8)


def main() -> None:
    """Check, time, print tables and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {"environment": environment(triton=triton.__version__)}
    bandwidth = record["environment"]["copy_tb_per_s"]
    print(f"{record['environment']['gpu']}, copy {bandwidth} TB/s", flush=True)
    compile_all()
    record["checks"] = guarded(lambda: check(CUTS))
    rows: list[dict[str, Any]] = []
    if not args.check:
        for length, batch in itertools.product(args.lengths, args.batches):
            rows += guarded(lambda n=length, b=batch: time_one(n, b, bandwidth)) or []
        tables(rows)
    record["times"] = rows
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def guarded(run: Callable[[], Any]) -> Any:
    """Return the result, or print the error, so that one failure does not hide the rest."""
    try:
        return run()
    except Exception as error:
        print(f"{type(error).__name__}: {error}"[:400], flush=True)
        torch.cuda.empty_cache()
        return None


def compile_all() -> None:
    """Compile the tunings in processes of their own, into Triton's cache on disk."""
    started = time.perf_counter()
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        for cut, text in zip(CUTS, pool.map(compile_one, CUTS), strict=True):
            if text:
                print(f"{cut}: {text[:200]}", flush=True)
    print(f"compiled {len(CUTS)} tunings in {time.perf_counter() - started:.0f} s", flush=True)


def compile_one(cut: tuple[int, int, int]) -> str:
    """Run one tuning on a small cache; return the error if there is one."""
    try:
        tuning = Tuning(*cut)
        for holes in (False, True) if cut in ((64, 4, 3), (64, 2, 3)) else (False,):
            difference(torch.bfloat16, DIM, 4, (300, 77), holes=holes, tuning=tuning)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def time_one(length: int, batch: int, bandwidth: float) -> list[dict[str, Any]]:
    """Time all tunings and torch's kernels on one shape: all slots full, then half."""
    size = 2 * batch * KV_HEADS * length * DIM * 2
    copies = min(64, max(1, math.ceil(COLD / size)))
    query = draw(batch, HEADS, 1, DIM, seed=0)
    shape = (batch, KV_HEADS, length, DIM)
    caches = [tuple(draw(*shape, seed=2 * i + j) for j in (1, 2)) for i in range(copies)]
    arrived = slots.counters(batch, KV_HEADS, query.device)
    column = torch.arange(length, dtype=torch.int32, device="cuda")
    rows: list[dict[str, Any]] = []
    budget = {"kernel": 4.0, "torch": 10.0}

    def timed(what: str, filled: int, call: Callable[..., Any], kind: str, **more: Any) -> None:
        run = [lambda k=k, v=v: call(k, v) for k, v in caches]
        us = guarded(lambda: cold_microseconds(run, budget[kind]))
        if us is None:
            return
        floor = size * filled / length / bandwidth / 1e6
        row = {"what": what, "kind": kind, "length": length, "batch": batch, "filled": filled}
        rows.append(row | {"us": us, "floor_us": floor, "fraction": floor / us, **more})

    for filled in (length, length // 2):
        used = torch.full((batch,), filled - 1, device="cuda")
        valid = (column < filled).expand(batch, KV_HEADS, length)
        position = torch.where(valid, column, -1).int().contiguous()

        def exact(k: Tensor, v: Tensor, end: int = filled) -> Tensor:
            return F.scaled_dot_product_attention(
                query, k[:, :, :end], v[:, :, :end], enable_gqa=True
            )

        def planless(k: Tensor, v: Tensor, end: int = filled) -> Tensor:
            with without_plans(k):
                return exact(k, v, end)

        def masked(k: Tensor, v: Tensor, position: Tensor = position) -> Tensor:
            return attend_slots(query, k, v, position >= 0, PARAMS)

        timed("sdpa, exact length", filled, exact, "torch")
        timed("sdpa without cuDNN, exact length", filled, planless, "torch")
        timed("sdpa, masked", filled, masked, "torch")

        def kernel(k: Tensor, v: Tensor, used: Tensor = used, **more: Any) -> Tensor:
            return attend(query, k, v, PARAMS, arrived, used=used, **more)

        tunings = [Tuning(*cut, share) for cut in CUTS for share in SHARES]
        usual = default_tuning(batch * KV_HEADS, length)
        for tuning in tunings if filled == length else [usual]:
            name = f"t{tuning.tile} w{tuning.warps} s{tuning.stages} p{tuning.share}"
            timed(
                name, filled, lambda k, v, t=tuning: kernel(k, v, tuning=t), "kernel",
                default=tuning == usual,
            )  # fmt: skip
        timed(
            "default, with positions", filled,
            lambda k, v, p=position: kernel(k, v, position=p), "torch",
        )  # fmt: skip
        if filled == length and batch == 1:
            for name, call in (("sdpa", planless), ("kernel", kernel)):
                print(f"{name}: {_host_us(call, caches[0]):.0f} us of host time a call", flush=True)
    _print_one(rows)
    return rows


def _host_us(call: Callable[..., Any], cache: tuple[Tensor, ...]) -> float:
    """Return what an eager call costs the host."""
    call(*cache)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        call(*cache)
    return (time.perf_counter() - start) * 1e4


def _print_one(rows: list[dict[str, Any]]) -> None:
    """Print torch's kernels, the default and the best five tunings of one shape."""
    best = sorted((r for r in rows if r["kind"] == "kernel"), key=lambda row: row["us"])
    full = [row for row in best if row["filled"] == row["length"]]
    chosen = [row for row in best if row.get("default")] + full[:5]
    for row in [row for row in rows if row["kind"] == "torch"] + chosen:
        note = " (default)" if row.get("default") else ""
        print(
            f"N={row['length']:>6} B={row['batch']:>2} filled {row['filled']:>6}"
            f" {row['what'] + note:<34} {row['us']:8.1f} us, {row['fraction']:6.1%} of the floor",
            flush=True,
        )


def tables(rows: list[dict[str, Any]]) -> None:
    """Print how near each tuning comes to the best one of every shape, by size of the work."""
    full = [row for row in rows if row["kind"] == "kernel" and row["filled"] == row["length"]]
    shapes = sorted({(row["length"] * row["batch"], row["length"], row["batch"]) for row in full})
    best = {
        (n, b): min(r["us"] for r in full if (r["length"], r["batch"]) == (n, b))
        for _, n, b in shapes
    }
    print("\nbest time over own time (geometric mean, worst shape), best tunings first")
    groups = {
        "up to 100 MB": lambda r: r["length"] * r["batch"] <= 24_000,
        "more": lambda r: r["length"] * r["batch"] > 24_000,
        "all": lambda r: True,
    }
    for name, member in groups.items():
        ratios: dict[str, list[float]] = {}
        for row in full:
            if member(row):
                near = best[row["length"], row["batch"]] / row["us"]
                ratios.setdefault(row["what"], []).append(near)
        ranked = sorted(ratios.items(), key=lambda item: -statistics.geometric_mean(item[1]))
        for what, near in ranked[:6]:
            mean = statistics.geometric_mean(near)
            print(f"{name:<13} {what:<16} {mean:6.1%} {min(near):6.1%} over {len(near)} shapes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2304, 4096, 8448, 33_000, 131_328]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--check", action="store_true", help="stop after the comparison")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
