"""Check and time decode attention over KIVI's packed cache, one Llama-3.1-8B layer.

Query heads 32, key/value heads 8, D 128. Correctness first, then every variant at every length and
batch, beside the fastest bf16 decode attention, then a table. Run it from the repository's root:

    python benchmarks/speed/kivi_decode.py --lengths 32768 131072 --out RESULTS.json
    python benchmarks/speed/kivi_decode.py --capacity --out CAPACITY.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from kivi_cases import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Case,
    compile_all,
    draw,
    errors,
    filled,
    guarded,
)
from kivi_memory import capacity, time_packing
from measure import environment, milliseconds, replayed_microseconds

from kvdock_kivi.geometry import Geometry
from kvdock_kivi.kernels import Tuning, attend

KINDS = [(2, 32, 128), (4, 32, 128), (2, 64, 128), (4, 128, 128), (2, 32, 32), (4, 32, 64)]
TUNINGS = [
    Tuning(warps, stages, resident, registers)
    for warps, stages, resident, registers in (
        (1, 2, 8, None), (1, 2, 16, None), (1, 2, 32, None), (1, 2, 64, None), (1, 3, 16, None),
        (1, 3, 32, None), (1, 2, 32, 200), (1, 2, 32, 168), (2, 2, 4, None), (2, 3, 4, None),
        (2, 2, 8, None), (2, 3, 8, None), (2, 2, 16, None), (2, 3, 16, None),
    )
]  # fmt: skip


def main() -> None:
    """Check, then time; print a table and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {"environment": environment(triton=triton.__version__)}
    bandwidth = record["environment"]["copy_tb_per_s"]
    print(f"{record['environment']['gpu']}, copy {bandwidth} TB/s", flush=True)
    if args.capacity:
        record["capacity"] = guarded(capacity)
        _write(args.out, record)
        return
    usual = [Geometry(bits, args.group, args.residual) for bits in args.bits]
    variants = [Case(kind, tuning=tuning) for kind in usual for tuning in TUNINGS]
    variants += [Case(Geometry(*kind), queries=n) for kind in KINDS for n in (1, 9)]
    guarded(lambda: compile_all(variants))
    record["checks"] = [guarded(lambda case=case: errors(case)) for case in checked()]
    record["times"] = []
    for length, batch in itertools.product(args.lengths, args.batches):
        record["times"] += time_dense(length, batch, args.flex)
        for kind in usual:
            record["times"] += time_packed(kind, length, batch, bandwidth, args.repeats)
    longest = max(args.lengths)
    record["packing"] = [guarded(lambda kind=kind: time_packing(kind, longest)) for kind in usual]
    table(record["times"])
    _write(args.out, record)


def checked() -> list[Case]:
    """Return what is compared with float64, queries of twice the usual size."""
    shapes = [
        ((1000,), 1), ((4096 + 77,), 1), ((32768,), 1),
        ((1000, 77, 4173, 129, 128, 300, 2048, 5), 1), ((4173, 700), 9), ((1000,), 200),
    ]  # fmt: skip
    cases = []
    for kind, (lengths, queries) in itertools.product(KINDS, shapes):
        both = (torch.float16, torch.bfloat16) if kind[1:] == (32, 128) else (torch.bfloat16,)
        for dtype in both:
            cases.append(Case(Geometry(*kind), lengths, queries, dtype=dtype, size=2))
    return cases


def time_dense(length: int, batch: int, flex: bool) -> list[dict[str, Any]]:
    """Time bf16 decode attention over the uncompressed cache."""
    q = draw(batch, HEADS, 1, HEAD_DIM)
    k, v = (draw(batch, KV_HEADS, length, HEAD_DIM, seed=i) for i in (1, 2))
    calls: dict[str, Callable[[], Any]] = {
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    }
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        calls["flex_attention"] = lambda: compiled(q, k, v, enable_gqa=True)
    try:
        from flash_attn.cute import flash_attn_func

        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        calls["flash-attn-4"] = lambda: flash_attn_func(*turned, causal=True)
    except Exception as error:
        print(f"flash-attn-4: {type(error).__name__}", flush=True)
    rows = []
    for name, run in calls.items():
        us = guarded(lambda r=run: milliseconds(r, repeats=20) * 1e3)
        if isinstance(us, float):
            rows.append({"what": name, "length": length, "batch": batch, "us": us})
            print(f"{name:<40} T={length} B={batch} {us:8.1f} us", flush=True)
    return rows


def time_packed(
    geometry: Geometry, length: int, batch: int, bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    """Time every tuning of the kernel on random codes."""
    cache = filled(geometry, length, batch)
    q = draw(batch, HEADS, 1, HEAD_DIM)
    rows_of = torch.arange(batch, dtype=torch.int32, device="cuda")
    sizes = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    held = sum(tensor.nbytes for tensor in cache.tensors().values())
    floor = held / bandwidth / 1e6
    rows = []
    for tuning in TUNINGS:

        def run(tuning: Tuning = tuning) -> Any:
            return attend(
                cache, geometry, q, q, rows_of, sizes, length, HEAD_DIM**-0.5,
                held=1, dtype=torch.bfloat16, tuning=tuning,
            )  # fmt: skip

        name = f"kivi-{geometry.bits} w{tuning.warps} s{tuning.stages} p{tuning.resident}"
        name += f" r{tuning.registers or '-'}"
        us = guarded(lambda r=run: replayed_microseconds(r, repeats))
        if isinstance(us, float):
            print(
                f"{name:<40} T={length} B={batch} {us:8.1f} us, floor {floor:6.1f},"
                f" {floor / us:5.1%}", flush=True,
            )  # fmt: skip
            rows.append({"what": name, "length": length, "batch": batch, "us": us})
            rows[-1] |= {"bytes": held, "floor_us": floor, "fraction": floor / us}
    return rows


def _write(path: str | None, record: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> None:
    """Print the best of every kind beside the best dense attention."""
    print(f"\n{'T':>7} {'B':>2} {'what':<28} {'us':>8} {'x dense':>8} {'of floor':>8}")
    for length, batch in sorted({(row["length"], row["batch"]) for row in rows}):
        here = [row for row in rows if (row["length"], row["batch"]) == (length, batch)]
        dense = [row for row in here if "floor_us" not in row]
        best = min((row["us"] for row in dense), default=float("nan"))
        for row in dense:
            print(f"{length:>7} {batch:>2} {row['what']:<28} {row['us']:8.1f}")
        for kind in sorted({row["what"].split()[0] for row in here if "floor_us" in row}):
            row = min((r for r in here if r["what"].startswith(kind)), key=lambda r: r["us"])
            print(
                f"{length:>7} {batch:>2} {row['what']:<28} {row['us']:8.1f}"
                f" {best / row['us']:8.2f} {row['fraction']:8.1%}"
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--residual", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too (compiles)")
    parser.add_argument("--capacity", action="store_true", help="only count rows that fit")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
