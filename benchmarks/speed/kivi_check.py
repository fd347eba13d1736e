"""Compare KIVI's kernels with float64 over all their shapes, then time them beside dense attention.

Half-precision answers to one query must be within 2e-3 of float64, those to turns of 9 and 200
queries too, though their queries are of twice the usual size; bfloat16 ones within 2e-2. A single
query of twice the usual size is reported only. Under a minute; from the repository's root:

    python benchmarks/speed/kivi_check.py --out RESULTS.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from kivi_cases import HEAD_DIM, HEADS, KV_HEADS, Case, compile_all, draw, errors, filled, guarded
from measure import environment, replayed_microseconds

from kvdock_kivi.geometry import Geometry
from kvdock_kivi.kernels import attend, decode_tuning

LAYOUTS = [(32, 64), (64, 64), (32, 128), (64, 128), (128, 128)]
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
LENGTHS = (1173, 300, 40)
"""Of the rows beside each other; the last holds nothing that is packed."""


def main() -> None:
    """Check, time, print and write; leave with an error where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too (compiles)")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    args = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(triton=triton.__version__)}
    bandwidth = record["environment"]["copy_tb_per_s"]
    cases = checked()
    usual = [Geometry(bits, 32, 128) for bits in (2, 4)]
    tuned = [
        Case(kind, tuning=decode_tuning(kind.bits, args.batch * KV_HEADS, args.length))
        for kind in usual
    ]
    compile_all([*variants(cases), *tuned])
    rows = [(case, errors(case)) for case in cases]
    record["checks"] = [row for _, row in rows]
    for dtype, queries, size in sorted({(str(c.dtype), c.queries, c.size) for c, _ in rows}):
        same = [r for c, r in rows if (str(c.dtype), c.queries, c.size) == (dtype, queries, size)]
        worst = {name: max(row[name] for row in same) for name in ("output", "answer", "rounding")}
        text = ", ".join(f"{name} {error:.2e}" for name, error in worst.items())
        print(f"{dtype[6:]} Q={queries} q×{size:g}: worst of {len(same)}: {text}", flush=True)
    wrong = [r["case"] for c, r in rows if demanded(c) and not r["answer"] <= LIMITS[c.dtype]]
    wrong += [r["case"] for _, r in rows if not r["same"]]
    record["times"] = times(args.length, args.batch, bandwidth, flex=args.flex) + turns()
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    if wrong:
        sys.exit("Further from float64 than allowed, or not the same twice: " + "; ".join(wrong))


def checked() -> list[Case]:
    """Return every combination in float16, and the usual layout in bfloat16 too."""
    cases = []
    for bits, (group, dim), heads, queries in itertools.product(
        (2, 4), LAYOUTS, (1, 4, 8), (1, 9, 200)
    ):
        kind = Geometry(bits, group, 128)
        usual = (group, dim, heads) == (32, 128, 4)
        for dtype in (torch.float16, torch.bfloat16) if usual else (torch.float16,):
            for size in (1, 2) if queries == 1 else (2,):
                cases.append(Case(kind, LENGTHS, queries, heads, dim, dtype, size))
    return cases


def demanded(case: Case) -> bool:
    """Say whether the case must keep the limit."""
    return case.queries > 1 or case.size == 1


def variants(cases: list[Case]) -> list[Case]:
    """Return one case for every kernel that has to be compiled, the slow ones first."""
    found: dict[object, Case] = {}
    for case in cases:
        count, repeat = case.group * case.queries, case.dim // case.geometry.group
        rows = 64 if count > 16 else min(64, max(16, triton.next_power_of_2(count * repeat)))
        key = (case.geometry, case.dim, case.dtype, rows, count > 16, case.queries > 1)
        found.setdefault(key, case)
    return sorted(found.values(), key=lambda case: -case.queries)


def times(length: int, batch: int, bandwidth: float, *, flex: bool) -> list[dict[str, Any]]:
    """Time a step over packed caches beside dense ones over the full cache, from CUDA graphs."""
    q = draw(batch, HEADS, 1, HEAD_DIM)
    k, v = (draw(batch, KV_HEADS, length, HEAD_DIM, seed=i) for i in (1, 2))
    calls: dict[str, Callable[[], Any]] = {
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    }
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        calls["flex_attention"] = lambda: compiled(q, k, v, enable_gqa=True)
    rows: list[dict[str, Any]] = []
    for name, run in calls.items():
        us = guarded(lambda run=run: replayed_microseconds(run, 20))
        if isinstance(us, float):
            rows.append({"what": name, "length": length, "batch": batch, "us": us})
            print(f"{name} T={length} B={batch} {us:.1f} us", flush=True)
    dense = min(row["us"] for row in rows)
    for bits in (2, 4):
        row = step(Geometry(bits, 32, 128), q, length, batch)
        floor = row["bytes"] / bandwidth / 1e6
        row |= {"times_dense": dense / row["us"], "of_floor": floor / row["us"]}
        rows.append(row)
        print(
            f"{row['what']} T={length} B={batch} {row['us']:.1f} us, {row['times_dense']:.2f} times"
            f" faster, {row['of_floor']:.0%} of the floor", flush=True,
        )  # fmt: skip
    return rows


def turns() -> list[dict[str, Any]]:
    """Time turns of 9 and 200 queries over 32768 packed tokens of one row."""
    rows = []
    for bits, queries in itertools.product((2, 4), (9, 200)):
        q = draw(1, HEADS, queries, HEAD_DIM)
        rows.append(step(Geometry(bits, 32, 128), q, 32_768, 1))
        print(f"{rows[-1]['what']} T=32768 Q={queries} {rows[-1]['us']:.1f} us", flush=True)
    return rows


def step(geometry: Geometry, q: torch.Tensor, length: int, batch: int) -> dict[str, Any]:
    """Time queries over a cache full of random codes."""
    cache = filled(geometry, length, batch)
    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    sizes = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    us = replayed_microseconds(
        lambda: attend(
            cache, geometry, q, q, rows, sizes, length, HEAD_DIM**-0.5, held=1, dtype=q.dtype
        ),
        20,
    )
    held = sum(tensor.nbytes for tensor in cache.tensors().values())
    return {
        "what": f"kivi-{geometry.bits}", "length": length, "batch": batch,
        "queries": q.shape[2], "us": us, "bytes": held,
    }  # fmt: skip


if __name__ == "__main__":
    main()
