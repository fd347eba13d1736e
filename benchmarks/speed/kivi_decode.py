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
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from measure import environment, milliseconds
from torch import Tensor

from kvdock_kivi import kernels, writing
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.kernels import Tuning, attend
from kvdock_kivi.packed import Packed
from kvdock_kivi.quantise import (
    dequantise_keys,
    dequantise_values,
    pack,
    quantise_keys,
    quantise_values,
    unpack,
)

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
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
    if not args.capacity:
        guarded(lambda: compile_all(args.bits))
    print(f"{record['environment']['gpu']}, copy {bandwidth} TB/s", flush=True)
    if args.capacity:
        record["capacity"] = guarded(capacity)
        _write(args.out, record)
        return
    record["checks"] = guarded(check)
    if args.check:
        _write(args.out, record)
        return
    record["times"] = []
    for length, batch in itertools.product(args.lengths, args.batches):
        record["times"] += time_dense(length, batch, args.flex)
        for bits in args.bits:
            record["times"] += time_packed(bits, length, batch, bandwidth, args)
    record["packing"] = [guarded(lambda b=b: time_packing(b, args)) for b in args.bits]
    table(record["times"])
    _write(args.out, record)


def guarded(run: Callable[[], Any]) -> Any:
    """Return the result, or the error as a text, so that one failure does not hide the rest."""
    try:
        return run()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(text[:400], flush=True)
        return text


def compile_all(bits: list[int]) -> None:
    """Compile the variants in processes of their own, into Triton's cache on disk."""
    started = time.perf_counter()
    jobs = [(b, 32, 128, 1, tuning) for b in bits for tuning in TUNINGS]
    jobs += [(*kind, queries, None) for kind in KINDS for queries in (1, 9)]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        for job, text in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if text:
                print(f"{job}: {text[:200]}", flush=True)
    print(f"compiled {len(jobs)} variants in {time.perf_counter() - started:.0f} s", flush=True)


def compile_one(job: tuple[int, int, int, int, Tuning | None]) -> str:
    """Run one variant on a small cache; return the error if it cannot run."""
    bits, group, residual, queries, tuning = job
    geometry, length = Geometry(bits, group, residual), 1024
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    dims = (HEAD_DIM, HEAD_DIM, HEAD_DIM)
    cache = Packed.empty(geometry, (1, KV_HEADS), length, dims, like)
    q = draw(1, HEADS, queries, HEAD_DIM)
    row = torch.zeros(1, dtype=torch.int32, device="cuda")
    size = torch.full((1,), length, dtype=torch.int32, device="cuda")
    try:
        attend(cache, geometry, q, q, row, size, length, 1.0, held=1, tuning=tuning)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normal numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def packed(geometry: Geometry, key: Tensor, value: Tensor, lengths: list[int]) -> Packed:
    """Pack rows of keys and values [B, K, T, D] with room for all of T."""
    batch, kv_heads, room, dim = key.shape
    cache = Packed.empty(geometry, (batch, kv_heads), room, (dim, dim, value.shape[-1]), key)
    for row, length in enumerate(lengths):
        keys, values = geometry.key_tokens(length), geometry.value_tokens(length)
        if keys:
            codes, scale, zero = quantise_keys(key[row, :, :keys], geometry)
            words = pack(codes, geometry)
            cache.key_codes[row, :, : words.shape[1]] = words
            cache.key_scale[row, :, : scale.shape[1]] = scale
            cache.key_zero[row, :, : scale.shape[1]] = zero
        if values:
            room_left = -values % geometry.block
            parts = quantise_values(value[row, :, :values], geometry)
            codes, scale, zero = (F.pad(part, (0, 0, 0, room_left)) for part in parts)
            words = pack(codes, geometry)
            blocks = words.shape[1]
            cache.value_codes[row, :, :blocks] = words
            cache.value_scale[row, :, :blocks] = scale.unflatten(1, (blocks, -1)).mT
            cache.value_zero[row, :, :blocks] = zero.unflatten(1, (blocks, -1)).mT
        newest = torch.arange(max(length - geometry.residual, 0), length, device=key.device)
        cache.key_rest[row, :, newest % geometry.residual] = key[row, :, newest]
        cache.value_rest[row, :, newest % geometry.residual] = value[row, :, newest]
    return cache


def exact(
    cache: Packed, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Attend in float64 over dequantised keys and values, row by row and head by head."""
    outputs, levels = [], []
    group = q.shape[1] // k.shape[1]
    for row, length in enumerate(lengths):
        keys, values = geometry.key_tokens(length), geometry.value_tokens(length)
        blocks = geometry.value_blocks(length)
        for head in range(k.shape[1]):
            key, value = k[row, head, :length].double(), v[row, head, :length].double()
            if keys:
                codes = unpack(cache.key_codes[row, head, : keys // geometry.block], geometry)
                groups = keys // geometry.group
                scale, zero = (x[row, head, :groups] for x in (cache.key_scale, cache.key_zero))
                key[:keys] = dequantise_keys(codes, scale, zero, geometry.group).double()
            if values:
                codes = unpack(cache.value_codes[row, head, :blocks], geometry)
                scale, zero = (
                    x[row, head, :blocks].mT.flatten(0, 1)
                    for x in (cache.value_scale, cache.value_zero)
                )
                full = dequantise_values(codes, scale, zero, geometry.group)
                value[:values] = full[:values].double()
            heads = slice(head * group, (head + 1) * group)
            scores = q[row, heads].double() @ key.T * HEAD_DIM**-0.5
            levels.append(scores.logsumexp(-1))
            outputs.append(scores.softmax(-1) @ value)
    return torch.stack(outputs).view(*q.shape), torch.stack(levels).view(q.shape[:3])


def check() -> list[dict[str, Any]]:
    """Compare the kernel with float64 over the same dequantised numbers."""
    rows = []
    cases = [
        ([1000], 1), ([4096 + 77], 1), ([32768], 1), ([1000, 77, 4173, 129, 128, 300, 2048, 5], 1),
        ([4173, 700], 9), ([1000], 200),
    ]  # fmt: skip
    print(f"{'case':>52} {'output':>9} {'lse':>9} {'peak':>9} same")
    for (bits, group, residual), (lengths, queries) in itertools.product(KINDS, cases):
        geometry = Geometry(bits, group, residual)
        usual = (group, residual) == (32, 128)
        for dtype in (torch.float16, torch.bfloat16) if usual else (torch.bfloat16,):
            batch, room = len(lengths), max(lengths)
            q = draw(batch, HEADS, queries, HEAD_DIM, seed=1, dtype=dtype) * 2
            k = draw(batch, KV_HEADS, room, HEAD_DIM, seed=2, dtype=dtype)
            v = draw(batch, KV_HEADS, room, HEAD_DIM, seed=3, dtype=dtype)
            k[..., 5] += 8  # a channel of its own range
            cache = packed(geometry, k, v, lengths)
            wanted, level = exact(cache, geometry, q, k, v, lengths)
            index = torch.arange(batch, dtype=torch.int32, device="cuda")
            sizes = torch.tensor(lengths, dtype=torch.int32, device="cuda")

            def run(
                a: Any = (cache, geometry, q, q, index, sizes, room), **more: Any
            ) -> tuple[Tensor, Tensor]:
                return attend(*a, HEAD_DIM**-0.5, held=0, **more)

            name = f"{bits} bit g{group} R{residual} {lengths} Q={queries} {str(dtype)[6:]}"
            found, lse = run()
            again, _ = run()
            off, apart = (found - wanted).abs().max().item(), (lse - level).abs().max().item()
            same = torch.equal(found, again)
            peak = wanted.abs().max().item()
            print(f"{name[-52:]:>52} {off:9.1e} {apart:9.1e} {peak:9.1e} {same}", flush=True)
            rows.append({"case": name, "output": off, "lse": apart, "same": same})
    worst = max(row["output"] for row in rows)
    print(f"worst {worst:.1e} over {len(rows)} cases", flush=True)
    return rows


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
    bits: int, length: int, batch: int, bandwidth: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time every tuning of the kernel on random codes."""
    geometry = Geometry(bits, args.group, args.residual)
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    dims = (HEAD_DIM, HEAD_DIM, HEAD_DIM)
    cache = Packed.empty(geometry, (batch, KV_HEADS), length, dims, like)
    for tensor in cache.tensors().values():
        if tensor.dtype == torch.int16:
            tensor.random_(-32768, 32767)
        else:
            tensor.uniform_(0.1, 1)
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

        name = f"kivi-{bits} w{tuning.warps} s{tuning.stages} p{tuning.resident}"
        name += f" r{tuning.registers or '-'}"
        us = guarded(lambda r=run: _graph_us(r, args.repeats))
        if isinstance(us, float):
            print(
                f"{name:<40} T={length} B={batch} {us:8.1f} us, floor {floor:6.1f},"
                f" {floor / us:5.1%}", flush=True,
            )  # fmt: skip
            rows.append({"what": name, "length": length, "batch": batch, "us": us})
            rows[-1] |= {"bytes": held, "floor_us": floor, "fraction": floor / us}
    return rows


def time_packing(bits: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time the packing of a prompt, a new token and a whole window; compare the bytes."""
    geometry = Geometry(bits, args.group, args.residual)
    length, rows = max(args.lengths), slice(0, 1)
    dims = (HEAD_DIM, HEAD_DIM, HEAD_DIM)
    k, v = (draw(1, KV_HEADS, length, HEAD_DIM, seed=i) for i in (1, 2))
    caches = [Packed.empty(geometry, (1, KV_HEADS), length, dims, k) for _ in range(2)]
    last = length - geometry.residual

    def write(cache: Packed, module: Any) -> None:
        module.write_keys(cache, geometry, rows, k, 0, None)
        module.write_values(cache, geometry, rows, v[:, :, :last], 0)

    write(caches[0], kernels)
    serves, writing.kernels_for = writing.kernels_for, lambda states: None
    write(caches[1], writing)
    writing.kernels_for = serves
    pairs = zip(caches[0].tensors().values(), caches[1].tensors().values(), strict=True)
    size = torch.full((1,), length, dtype=torch.int32, device="cuda")
    k1, v1 = k[:, :, :1], v[:, :, :1]
    found = {
        "what": f"kivi-{bits} packing",
        "length": length,
        "same_bytes_as_torch": all(torch.equal(x, y) for x, y in pairs),
        "prompt_ms": milliseconds(lambda: write(caches[0], kernels)),
        "token_us": 1e3
        * milliseconds(lambda: kernels.append_token(caches[0], geometry, k1, v1, size - 1)),
        "window_us": 1e3
        * milliseconds(
            lambda: kernels.write_keys(caches[0], geometry, rows, k[:, :, last:], last, None)
        ),
    }
    print(found, flush=True)
    return found


def capacity() -> dict[str, Any]:
    """Allocate weights and caches of Llama-3.1-8B, one row of 32K after the other, until full."""
    layers, length, weights = 32, 32_768, 8_030_261_248
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    dims = (HEAD_DIM, HEAD_DIM, HEAD_DIM)

    def full() -> list[Tensor]:
        shape = (2, layers, KV_HEADS, length, HEAD_DIM)
        return [torch.empty(shape, dtype=torch.bfloat16, device="cuda")]

    def packed_row(bits: int) -> list[Tensor]:
        geometry = Geometry(bits, 32, 128)
        caches = [Packed.empty(geometry, (1, KV_HEADS), length, dims, like) for _ in range(layers)]
        return [tensor for cache in caches for tensor in cache.tensors().values()]

    found: dict[str, Any] = {"length": length, "memory": torch.cuda.mem_get_info()[1]}
    held = [torch.empty(weights, dtype=torch.bfloat16, device="cuda")]
    for name, make in (
        ("full", full), ("kivi-4", lambda: packed_row(4)), ("kivi-2", lambda: packed_row(2))
    ):  # fmt: skip
        rows: list[list[Tensor]] = []
        try:
            while True:
                rows.append(make())
        except torch.cuda.OutOfMemoryError:
            found[name] = {"rows": len(rows), "row_bytes": sum(x.nbytes for x in rows[0])}
        print(name, found[name], flush=True)
        rows.clear()
        torch.cuda.empty_cache()
    found["weight_bytes"] = held[0].nbytes
    return found


def _write(path: str | None, record: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")


def _graph_us(run: Callable[[], Any], repeats: int) -> float:
    """Return the device time of a call replayed from a CUDA graph, without launch gaps."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, repeats=repeats) * 1e3


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
    parser.add_argument("--check", action="store_true", help="stop after the comparison")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
