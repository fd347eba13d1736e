"""Check and time H2O's Triton kernels on a GPU, one Llama-3.1-8B layer (Hq 32, Hkv 8, D 128).

Every tile is timed for both kernels: the column sums with the log-sum-exps given, and the
log-sum-exps. Dense attention of the same shape stands beside them. Run it from the repository's
root:

    python benchmarks/speed/h2o_kernel.py --lengths 32768 131072 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from measure import environment
from torch import Tensor

from kvdock.kernels.sdpa import SDPABackend
from kvdock.policy import AttentionParams
from kvdock_h2o.kernels import LOG2E, Tile, column_sums, log2_sum_exp2
from kvdock_h2o.scores import reference_column_sums

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SUM_TILES = (
    Tile(128, 64, 4, 3), Tile(128, 64, 4, 3, copies=True), Tile(128, 64, 4, 2, copies=True),
    Tile(128, 64, 4, 4, copies=True), Tile(128, 64, 4, 2, 168, copies=True),
    Tile(128, 64, 4, 3, 168, copies=True), Tile(128, 128, 8, 2, copies=True),
    Tile(128, 128, 8, 3, copies=True), Tile(64, 128, 4, 3, copies=True),
    Tile(256, 64, 8, 3, copies=True),
)  # fmt: skip
LSE_TILES = (
    Tile(64, 128, 4, 3), Tile(64, 128, 8, 3), Tile(128, 128, 8, 2, 128), Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3), Tile(128, 64, 4, 2), Tile(64, 256, 8, 3), Tile(64, 64, 4, 3),
)  # fmt: skip


def main() -> None:
    """Check first, then time; print a table and write the numbers."""
    args = _arguments()
    record: dict[str, Any] = {
        "environment": environment(triton=triton.__version__),
        "checks": check(),
        "times": [],
    }
    for length in args.lengths:
        record["times"] += time_all(length, args.repeats, args.sums_only)
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def states(
    rows: int, heads: int, kv_heads: int, q: int, n: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return queries and keys laid out as a model's: tokens before heads in memory."""
    generator = torch.Generator("cuda").manual_seed(n)

    def draw(count: int, length: int) -> Tensor:
        shape = (rows, length, count, head_dim)
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    return draw(heads, q), draw(kv_heads, n)


def check() -> list[dict[str, Any]]:
    """Compare the kernels with plain torch at even and odd sizes; raise where they differ."""
    cases = [
        (1, 32, 8, 2048, 2048, 128, torch.bfloat16), (2, 8, 8, 1000, 1000, 64, torch.float16),
        (1, 24, 8, 777, 777, 96, torch.bfloat16), (1, 16, 2, 333, 1501, 128, torch.bfloat16),
        (2, 6, 2, 1, 130, 64, torch.float32), (1, 8, 2, 515, 515, 128, torch.float32),
        (1, 32, 8, 513, 4099, 128, torch.bfloat16),
    ]  # fmt: skip
    rows = []
    print(f"{'case':>44} {'relative':>9} {'mass':>9}")
    for case in cases:
        q, k = states(*case)
        scaling = q.shape[-1] ** -0.5
        exact = reference_column_sums(q, k, AttentionParams(scaling))
        level = log2_sum_exp2(q, k, scaling)
        mass = q.shape[1] // k.shape[1] * q.shape[2]
        tiles = {"": None, " copies": Tile(64, 32, 4, 2, copies=True)}
        for (name, lse), (kind, tile) in itertools.product(
            (("own lse", None), ("lse given", level / LOG2E)), tiles.items()
        ):
            name += kind
            found = column_sums(q, k, scaling, lse, tile=tile)
            again = column_sums(q, k, scaling, lse, tile=tile)
            relative = ((found - exact).abs() / exact).max().item()
            lost = ((found.sum(-1) - mass).abs() / mass).max().item()
            print(f"{f'{case[:6]} {case[6]} {name}'.replace('torch.', ''):>44}", end="")
            print(f" {relative:9.1e} {lost:9.1e}", flush=True)
            assert relative < 2e-4 and lost < 1e-4, "the kernel differs from plain torch"
            assert torch.equal(found, again), "two runs differ"
            rows.append({"case": str(case), "lse": name, "relative": relative, "mass": lost})
    return rows


def time_all(length: int, repeats: int, sums_only: bool) -> list[dict[str, Any]]:
    """Time every tile and the dense attention at one length."""
    q, k = states(1, HEADS, KV_HEADS, length, length, HEAD_DIM, torch.bfloat16)
    scaling = HEAD_DIM**-0.5
    half = length * length * HEAD_DIM * HEADS  # q·k over the causal half
    rows: list[dict[str, Any]] = []

    def note(name: str, tile: Tile | None, flop: int, run: Callable[[], Any]) -> None:
        try:
            ms, extra = measure(run, repeats)
        except Exception as error:  # a tile that does not fit this GPU
            print(f"{length:>8} {name:<28} {tile or ''} failed: {str(error)[:80]}", flush=True)
            return
        shape = ""
        if tile:
            shape = f"{tile.keys}x{tile.queries} w{tile.warps} s{tile.stages}"
            shape += f" r{tile.registers}" if tile.registers else ""
            shape += " copies" if tile.copies else ""
        rows.append({"length": length, "what": name, "tile": shape, "ms": ms, "MiB": extra})
        rows[-1]["TFLOP/s"] = flop / ms / 1e9
        print(
            f"{length:>8} {name:<28} {shape:<18} {ms:9.2f} ms {flop / ms / 1e9:7.0f} TFLOP/s"
            f" {extra:7.0f} MiB",
            flush=True,
        )

    level = log2_sum_exp2(q, k, scaling)
    lse = level / LOG2E
    for tile in SUM_TILES:
        note("sums, lse given", tile, half, lambda t=tile: column_sums(q, k, scaling, lse, tile=t))
    if sums_only:
        return rows
    for tile in LSE_TILES:
        note("lse", tile, half, lambda t=tile: log2_sum_exp2(q, k, scaling, tile=t))
    note("sums and lse, default tiles", None, 2 * half, lambda: column_sums(q, k, scaling))
    v = torch.randn_like(k)
    for name, attend in dense(q, k, v, scaling).items():
        note(name, None, 2 * half, attend)
    compare_lse(q, k, v, scaling, lse)
    return rows


def dense(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> dict[str, Callable[[], Any]]:
    """Return the dense attention a model would run, and the fastest where it is installed."""
    settings = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    calls: dict[str, Callable[[], Any]] = {
        "dense, sdpa": lambda: F.scaled_dot_product_attention(q, k, v, **settings)
    }
    try:
        from flash_attn.cute import flash_attn_func
    except Exception:  # not installed
        return calls
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    calls["dense, flash-attn-4"] = lambda: flash_attn_func(
        *turned, softmax_scale=scaling, causal=True
    )
    return calls


def compare_lse(q: Tensor, k: Tensor, v: Tensor, scaling: float, lse: Tensor) -> None:
    """Say whether the core's sdpa backend gives these log-sum-exps and the same output bits."""
    backend, params = SDPABackend(), AttentionParams(scaling)
    output, found = backend.attend_lse(q, k, v, params)
    same = torch.equal(output, backend.attend(q, k, v, params))
    apart = math.nan if found is None else (found - lse).abs().max().item()
    print(f"{q.shape[2]:>8} lse of sdpa: off by {apart:.1e}, same output bits: {same}", flush=True)


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
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sums-only", action="store_true", help="leave out the other kernels")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
