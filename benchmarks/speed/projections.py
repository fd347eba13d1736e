"""Time the projections of a decode step, Llama-3.1-8B shape, bfloat16: cuBLAS beside Triton.

Every call is timed in a CUDA graph that goes over the weights of 32 layers, so that none of them is
in a cache. Then whole steps without attention: norms, turns and projections one after the other,
each waiting for the one before, as the model runs them. From the repository's root (< 90 s):

    python benchmarks/speed/projections.py --out RESULTS.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from measure import captured, cold_microseconds, environment, event
from projection_grid import GROUPS, Choice, Group, choices, compile_one, worst
from torch import Tensor

from kvdock.kernels import step_triton
from kvdock.kernels.overlap import starting

Weights = dict[str, list[list[Tensor]]]
SPENT = 6.0
"""Milliseconds of replays for each timing."""


def main() -> None:
    """Check and time every kernel, then whole steps, print tables and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {"environment": environment(triton=triton.__version__)}
    bandwidth = record["environment"]["copy_tb_per_s"]
    print(f"{record['environment']['gpu']}, copy {bandwidth} TB/s", flush=True)
    record["failed"] = compile_all(args)
    weights = draw(args.layers)
    record["times"], record["steps"] = [], []
    for rows in args.rows:
        for group in GROUPS:
            record["times"] += time_group(group, rows, weights[group.name], bandwidth, args.most)
    common(record["times"])
    for rows in args.rows:
        record["steps"] += time_steps(rows, weights, record["times"], bandwidth)
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def compile_all(args: argparse.Namespace) -> dict[str, str]:
    """Compile all kernels in processes of their own; return the errors."""
    started, failed = time.perf_counter(), {}
    jobs = [
        (gated, choice)
        for gated in (False, True)
        for choice in dict.fromkeys(c for rows in args.rows for c in choices(gated, rows))
    ]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for (gated, choice), text in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if text:
                failed[f"{'gated ' * gated}{choice}"] = text
                print(f"{'gated ' * gated}{choice}: {text[:200]}", flush=True)
    print(f"compiled {len(jobs)} kernels in {time.perf_counter() - started:.0f} s", flush=True)
    return failed


def draw(layers: int) -> Weights:
    """Return random weights of every layer."""
    return {
        group.name: [
            [
                torch.empty(n, group.inputs, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
                for n in group.outputs
            ]
            for _ in range(min(layers, group.copies) if group.copies > 1 else 1)
        ]
        for group in GROUPS
    }


def time_group(
    group: Group, rows: int, weights: list[list[Tensor]], bandwidth: float, most: int
) -> list[dict[str, Any]]:
    """Check and time one group's kernels beside the library's."""
    states = torch.randn(rows, 1, group.inputs, device="cuda", dtype=torch.bfloat16)
    layers = weights * math.ceil(4 / len(weights))
    case = {"group": group.name, "rows": rows}
    us = cold_microseconds([lambda w=w: group.library(states, w) for w in layers], 2 * SPENT)
    found = [case | {"what": "cublas", "us": us}]
    for choice in choices(group.gated, rows)[:most]:
        try:
            error = worst(group, group.kernel(states, weights[0], choice), states, weights[0])
            calls = [lambda w=w, c=choice: group.kernel(states, w, c) for w in layers]
            us = cold_microseconds(calls, SPENT)
        except Exception as failure:
            print(f"{case} {choice}: {type(failure).__name__}: {failure}"[:300], flush=True)
            continue
        if not error < 3:
            print(f"WRONG {case} {choice}: off by {error:.1f} units", flush=True)
            continue
        tile = {name: getattr(choice.tile, name) for name in choice.tile.__slots__}
        more = {"early": choice.early, "lanes": choice.lanes, "units_off": round(error, 2)}
        found.append(case | {"what": str(choice), "us": us} | tile | more)
    for row in found:
        row["tb_per_s"] = round(group.bytes / row["us"] / 1e6, 3)
        row["us"] = round(row["us"], 2)
    floor = group.bytes / bandwidth / 1e6
    print(f"\n{group.name} {'+'.join(map(str, group.outputs))} x {group.inputs}, {rows} rows:"
          f" floor {floor:.1f} us, cublas {found[0]['us']:.1f}", flush=True)  # fmt: skip
    for early in (False, True):
        best = sorted((r for r in found[1:] if r["early"] == early), key=lambda r: r["us"])
        for row in best[:6]:
            print(f"    {row['us']:7.2f} us {row['tb_per_s']:.2f} TB/s  {row['what']}", flush=True)
    return found


def common(times: list[dict[str, Any]]) -> None:
    """Print which kernels serve all groups well: best time over own time, mean and worst."""
    print("\none kernel for all groups (best over own time: geometric mean, worst)")
    for kind in (lambda rows: rows == 1, lambda rows: rows > 1):
        for gated in (False, True):
            shares: dict[str, list[float]] = {}
            for row in times:
                if "early" not in row or not kind(row["rows"]):
                    continue
                if (row["group"] == "gate+up") != gated:
                    continue
                rivals = [r["us"] for r in times if "early" in r
                          and (r["group"], r["rows"]) == (row["group"], row["rows"])]  # fmt: skip
                shares.setdefault(row["what"], []).append(min(rivals) / row["us"])
            means = {w: math.exp(sum(map(math.log, s)) / len(s)) for w, s in shares.items()}
            for what in sorted(means, key=lambda w: -means[w])[:8]:
                label = f"{'one row' if kind(1) else 'more':8}{'gated' if gated else 'plain':6}"
                print(f"    {label}{means[what]:.3f} {min(shares[what]):.3f}  {what}", flush=True)


def time_steps(
    rows: int, weights: Weights, times: list[dict[str, Any]], bandwidth: float
) -> list[dict[str, Any]]:
    """Time steps without attention: by the library and by the best kernels, in turn and early."""
    by_text = {str(c): c for gated in (False, True) for c in choices(gated, rows)}
    steps: dict[str, dict[str, Choice] | None] = {}
    steps["cublas, in turn"] = steps["cublas, small kernels early"] = None
    for early in (False, True):
        best: dict[str, Choice] = {}
        for group in GROUPS:
            own = [r for r in times if r["group"] == group.name and r["rows"] == rows
                   and r.get("early") == early]  # fmt: skip
            if own:
                best[group.name] = by_text[min(own, key=lambda r: r["us"])["what"]]
        steps[f"best kernels, {'early' if early else 'in turn'}"] = best
    made = []
    floor = sum(g.bytes * len(weights[g.name]) for g in GROUPS) / bandwidth / 1e9
    print(f"\nstep without attention, {rows} rows: floor {floor:.2f} ms", flush=True)
    for name, best in steps.items():
        try:
            ms, output = step_milliseconds(rows, weights, best, early="early" in name)
        except Exception as failure:
            print(f"    {name}: {type(failure).__name__}: {failure}"[:300], flush=True)
            continue
        made.append({"rows": rows, "what": name, "ms": round(ms, 4), "of_floor": floor / ms})
        if len(made) == 1:
            first = output
        error = (output.float() - first.float()).abs().max() / first.float().abs().max()
        made[-1]["differs"] = float(error)
        print(f"    {ms:6.3f} ms {floor / ms:.1%}  differs {float(error):.1e}  {name}", flush=True)
    return made


def step_milliseconds(
    rows: int, weights: Weights, best: dict[str, Choice] | None, *, early: bool
) -> tuple[float, Tensor]:
    """Return the time of a replayed step and its logits."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    states = torch.randn(rows, 1, 4096, **shape)
    scale = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.randn(2, rows, 1, 128, **shape)
    groups = {group.name: group for group in GROUPS}

    def project(name: str, given: Tensor, layer: int) -> list[Tensor]:
        group, own = groups[name], weights[name][layer]
        if best is not None:
            return group.kernel(given, own, best[name])
        made = [F.linear(given, weight) for weight in own]
        return [step_triton.gated(*made)] if group.gated else made

    def step() -> Tensor:
        total, normed = states, step_triton.rms_norm(states, scale, 1e-5)
        for layer in range(len(weights["o"])):
            query, key, _ = project("q+k+v", normed, layer)
            parts = query.view(rows, 1, 32, 128), key.view(rows, 1, 8, 128)
            turned, _ = step_triton.rotate(*parts, cos, sin)
            attended = turned.reshape(rows, 1, 4096)
            (added,) = project("o", attended, layer)
            total, normed = step_triton.add_rms_norm(total, added, scale, 1e-5)
            (opened,) = project("gate+up", normed, layer)
            (added,) = project("down", opened, layer)
            total, normed = step_triton.add_rms_norm(total, added, scale, 1e-5)
        return project("head", normed, 0)[0]

    with starting(early):
        graph, output = captured(step)
    graph.replay()
    spans = []
    for _ in range(8):
        start = event()
        graph.replay()
        stop = event()
        stop.synchronize()
        spans.append(start.elapsed_time(stop))
    return sorted(spans)[len(spans) // 2], output.clone()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--most", type=int, default=1000, help="kernels tried of each group")
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
