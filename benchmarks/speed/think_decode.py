"""Check and time ThinK's decode attention on a GPU, one Llama-3.1-8B layer (Hq 32, Hkv 8, D 128).

Every tile is timed for both ratios beside dense attention over keys of full width. A call walks
over as many layers as it takes to leave the level-2 cache behind, inside one CUDA graph, so that
device time is compared and not the launches; eager times stand beside it. Run it from the
repository's root:

    python benchmarks/speed/think_decode.py --out RESULTS.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from measure import environment, milliseconds
from torch import Tensor

from kvdock.dense import DenseStorage
from kvdock.policy import AttentionParams
from kvdock.storage import RowGroup
from kvdock_think.attention import Entries
from kvdock_think.channels import kept_channels
from kvdock_think.kernels import Tile, attend
from kvdock_think.storage import ThinKStorage

HEADS, KV_HEADS, HEAD_DIM, RECENT, BLOCK = 32, 8, 128, 32, 128
COLD_BYTES = 256 * 2**20
"""Bytes that one walk over the layers reads at least, five times the level-2 cache."""
TILES = (
    Tile(64, 4, 3, 2), Tile(64, 4, 3, 2, masked=True), Tile(64, 4, 4, 2), Tile(64, 4, 3, 1),
    Tile(64, 4, 2, 4), Tile(64, 4, 2, 3), Tile(128, 4, 2, 2), Tile(128, 4, 3, 1),
    Tile(128, 8, 3, 1), Tile(128, 8, 2, 2), Tile(32, 4, 4, 4), Tile(64, 2, 3, 2),
    Tile(64, 8, 3, 2), Tile(32, 2, 4, 4), Tile(128, 4, 2, 2, masked=True), Tile(64, 2, 4, 2),
)  # fmt: skip


def main() -> None:
    """Check first, then time; print a table and write the numbers."""
    args = _arguments()
    began = time.monotonic()
    record: dict[str, Any] = {"environment": environment(triton=triton.__version__)}
    record["checks"] = check()
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    copy = record["environment"]["copy_tb_per_s"]
    record["times"], record["steps"] = [], []
    for rows, slots in ((b, n) for b in args.rows for n in args.slots):
        record["times"] += dense_times(rows, slots)
    for ratio, tile in ((r, t) for t in TILES for r in args.ratios):
        if time.monotonic() - began > args.seconds:
            print(f"out of time before ratio {ratio} {tile}", flush=True)
            break
        for rows, slots in ((b, n) for b in args.rows for n in args.slots):
            record["times"] += think_times(rows, slots, ratio, tile)
    table(record["times"], copy)
    for rows, slots in ((b, n) for b in args.rows for n in args.slots[:3] if args.steps):
        record["steps"] += step_times(rows, slots)
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def check() -> list[dict[str, Any]]:
    """Compare the kernel with float64 over zero-filled keys; say where they differ."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    cases = [
        # lengths, query heads, key/value heads, D, D', queries, steps, dtype
        ([4096], 32, 8, 128, 80, 1, 3, brain), ([4096], 32, 8, 128, 64, 1, 0, half),
        ([1000, 37, 5000], 32, 8, 128, 96, 1, 2, half), ([777], 24, 8, 96, 64, 1, 1, half),
        ([300, 20], 8, 8, 64, 48, 1, 140, half), ([2000], 32, 4, 64, 32, 1, 0, brain),
        ([1500], 32, 8, 128, 80, 333, 0, half), ([400, 900], 6, 2, 128, 64, 70, 1, single),
        ([500], 8, 2, 256, 160, 1, 0, brain), ([31], 4, 2, 16, 12, 1, 0, single),
        ([130_000], 32, 8, 128, 80, 1, 0, half),
    ]  # fmt: skip
    found = []
    for case in cases:
        lengths, heads, kv_heads, dim, kept, queries, steps, dtype = case
        name = f"{lengths} {heads}/{kv_heads} D={dim} D'={kept} Q={queries} {dtype}"
        limit = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        try:
            error = _error(lengths, heads, kv_heads, dim, kept, queries, steps, dtype)
        except Exception as problem:
            found.append({"case": name, "failed": f"{type(problem).__name__}: {problem}"[:300]})
        else:
            found.append({"case": name, "error": error, "ok": error <= limit})
        print(found[-1], flush=True)
    return found


def _error(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    dim: int,
    kept: int,
    queries: int,
    steps: int,
    dtype: torch.dtype,
) -> float:
    """Return the largest error of output and log-sum-exp after some steps."""
    torch.manual_seed(sum(lengths))
    storage = ThinKStorage(RECENT, BLOCK)
    groups = []
    for row, n in enumerate(lengths):
        key, value = (torch.randn(1, kv_heads, n, dim, device="cuda").to(dtype) for _ in range(2))
        position = torch.arange(n, device="cuda").expand(1, kv_heads, n)
        channels = torch.rand(1, kv_heads, dim, device="cuda").topk(kept).indices.sort().values
        groups.append(RowGroup((row,), key, value, position, channels=channels))
    storage.fill(groups, max(lengths) + steps, ordered=True)
    for step in range(steps):
        new = (
            torch.randn(len(lengths), kv_heads, 1, dim, device="cuda").to(dtype) for _ in range(2)
        )
        storage.append_step(*new, [n + step for n in lengths], max(lengths) + steps)
    query = torch.randn(len(lengths), heads, queries, dim, device="cuda").to(dtype)
    params, errors = AttentionParams(dim**-0.5), []
    found, level = storage.attend_past(query, range(len(lengths)), params)
    for row in range(len(lengths)):
        one = storage.row(row)
        group = heads // kv_heads
        key, value = (x[0].double().repeat_interleave(group, dim=0) for x in (one.keys, one.values))
        scores = query[row].double() @ key.transpose(1, 2) * params.scaling
        exact, total = scores.softmax(-1) @ value, scores.logsumexp(-1)
        errors += [(found[row] - exact).abs().max(), (level[row] - total).abs().max()]
        if queries == 1:
            step = storage.attend_step(query, params)[row, 0].double()
            errors.append((step - exact[:, 0]).abs().max())
    return max(error.item() for error in errors)


def layers(rows: int, slots: int, kept: int) -> list[Entries]:
    """Return the entries of as many layers as it takes to read from memory."""
    new = {"device": "cuda", "dtype": torch.bfloat16}
    one = rows * KV_HEADS * slots * (kept + HEAD_DIM) * 2
    order = torch.rand(rows, KV_HEADS, HEAD_DIM, device="cuda").argsort(-1)
    order = torch.cat([order[..., :kept].sort().values, order[..., kept:].sort().values], dim=-1)
    return [
        Entries(
            torch.randn(rows, KV_HEADS, slots, kept, **new),
            torch.randn(rows, KV_HEADS, RECENT + BLOCK, HEAD_DIM - kept, **new),
            torch.randn(rows, KV_HEADS, slots, HEAD_DIM, **new),
            order,
            [slots] * rows,
            [slots - RECENT - 64] * rows,
        )
        for _ in range(min(48, -(-COLD_BYTES // one)))
    ]


def think_times(rows: int, slots: int, ratio: float, tile: Tile) -> list[dict[str, Any]]:
    """Time one tile at one size."""
    kept = kept_channels(HEAD_DIM, ratio)
    stack = layers(rows, slots, kept)
    query = torch.randn(rows, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    size = rows * KV_HEADS * (slots * (kept + HEAD_DIM) + 96 * (HEAD_DIM - kept)) * 2
    scale = HEAD_DIM**-0.5
    shape = f"{tile.tokens} w{tile.warps} s{tile.stages} r{tile.resident}"
    shape += " masked" if tile.masked else ""
    what = {"rows": rows, "slots": slots, "what": f"think {ratio}", "tile": shape}
    return timed(
        what, size, stack, lambda one: attend(query, one, scale, torch.bfloat16, tile=tile)
    )


def dense_times(rows: int, slots: int) -> list[dict[str, Any]]:
    """Time dense attention over full keys: as transformers calls it, and the group as queries."""
    query = torch.randn(rows, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    size = rows * KV_HEADS * slots * 2 * HEAD_DIM * 2
    stack = [
        [
            torch.randn(rows, KV_HEADS, slots, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        ]
        for _ in range(min(48, -(-COLD_BYTES // size)))
    ]
    scale = HEAD_DIM**-0.5
    grouped = query.view(rows, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    sdpa = F.scaled_dot_product_attention
    calls: dict[str, Callable[[list[Tensor]], Any]] = {
        "sdpa enable_gqa": lambda kv: sdpa(query, *kv, scale=scale, enable_gqa=True),
        "sdpa, group as queries": lambda kv: sdpa(grouped, *kv, scale=scale),
    }
    found = []
    for name, call in calls.items():
        found += timed({"rows": rows, "slots": slots, "what": name, "tile": ""}, size, stack, call)
    return found


def timed(
    what: dict[str, Any], size: int, stack: Sequence[Any], call: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """Return device and eager microseconds of one call; print and skip what does not run."""

    def walk() -> None:
        for one in stack:
            call(one)

    try:
        walk()
        torch.cuda.synchronize()
        eager = milliseconds(walk, repeats=3) / len(stack) * 1e3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            walk()
        device = milliseconds(graph.replay, repeats=8) / len(stack) * 1e3
    except Exception as error:  # a tile that does not fit this GPU
        print(f"{what} failed: {type(error).__name__}: {str(error)[:120]}", flush=True)
        torch.cuda.synchronize()
        return []
    return [what | {"us": device, "eager_us": eager, "TB/s": size / device / 1e6, "bytes": size}]


def step_times(rows: int, slots: int) -> list[dict[str, Any]]:
    """Time whole eager steps, append and attend, of ThinK's storage and of the dense one."""
    shape = (rows, KV_HEADS, slots, HEAD_DIM)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    position = torch.arange(slots, device="cuda").expand(shape[:3])
    channels = torch.arange(80, device="cuda").expand(rows, KV_HEADS, 80)
    new = torch.randn(rows, KV_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(rows, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    params, found = AttentionParams(HEAD_DIM**-0.5), []
    group = RowGroup(tuple(range(rows)), key, value, position, channels=channels)
    think, dense = ThinKStorage(RECENT, BLOCK), DenseStorage()
    capacity = slots + 256
    think.fill([group], capacity, ordered=True)
    dense.fill([group])
    for name, storage in (("think", think), ("dense", dense)):

        def step(storage: Any = storage) -> None:
            storage.append_step(new, new, [storage.live[0]] * rows, capacity)
            storage.attend_step(query, params)

        try:
            us = milliseconds(step, repeats=100, warm_up=5) * 1e3
        except Exception as error:
            print(f"step of {name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        found.append({"rows": rows, "slots": slots, "what": f"{name}, append and attend", "us": us})
        print(f"step B={rows} {slots:>6} {name:<6} {us:8.1f} us", flush=True)
    return found


def table(times: list[dict[str, Any]], copy: float) -> None:
    """Print the best tiles of every size beside dense attention."""
    print(f"copy bandwidth {copy} TB/s; us of device time, TB/s, share of copy, dense/this, eager")
    for rows, slots in sorted({(t["rows"], t["slots"]) for t in times}):
        here = [t for t in times if (t["rows"], t["slots"]) == (rows, slots)]
        dense = [t for t in here if t["what"].startswith("sdpa")]
        fastest = min((t["us"] for t in dense), default=float("nan"))
        best = dense
        for what in sorted({t["what"] for t in here} - {t["what"] for t in dense}):
            best += sorted((t for t in here if t["what"] == what), key=lambda t: t["us"])[:4]
        for t in best:
            print(
                f"B={rows} {slots:>6} {t['what']:<22} {t['tile']:<18} {t['us']:8.1f} us"
                f" {t['TB/s']:5.2f} {t['TB/s'] / copy:5.0%} {fastest / t['us']:5.2f}x"
                f" {t['eager_us']:8.1f} us",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[1024, 4096, 32_768, 131_072])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.375, 0.5])
    parser.add_argument("--seconds", type=float, default=75, help="start no tile after this")
    parser.add_argument("--steps", action="store_true", help="time eager steps as well")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
