"""Check and time the block-sparse kernels of one layer, on random lists."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import torch
from measure import milliseconds
from sparse_cases import HEAD_DIM, HEADS, SCALING, random_lists, states
from torch import Tensor

from kvdock.kernels import BACKENDS
from kvdock.kernels.blocks import BlockLists, density
from kvdock.kernels.sparse import SPARSE_BACKENDS, SparseBackend
from kvdock.kernels.sparse_reference import ReferenceSparse
from kvdock.kernels.sparse_triton import SparseTile, TritonSparse
from kvdock.policy import AttentionParams

Rows = list[dict[str, Any]]
PARAMS = AttentionParams(SCALING)
TOLERANCE = 2e-2
LENGTHS = (1, 127, 128, 129, 1000, 4096, 4097)
SIZES = (*((length, length) for length in LENGTHS), (129, 1000), (300, 4096))
"""Queries at the end of keys."""
PUBLISHED_TFLOPS = 295
"""FlexPrefill's own kernel on an H100, 128K, density 0.1, measured on another day."""


def run(section: str, args: argparse.Namespace) -> tuple[Rows, str]:
    """Run one of the sections check, attention and variants."""
    make = {"check": check, "attention": attention, "variants": variants}[section]
    rows = list(make(args))
    return rows, table(rows)


def usable(args: argparse.Namespace) -> Iterable[tuple[str, SparseBackend]]:
    """Yield the sparse backends that run here; say why the others do not."""
    for name in args.backends or SPARSE_BACKENDS:
        start = time.time()
        try:
            backend = SPARSE_BACKENDS[name](torch.device("cuda"), torch.bfloat16, HEAD_DIM, 128)
        except Exception as error:
            print(f"{name}: not usable: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{name}: usable, loaded and tried in {time.time() - start:.1f} s", flush=True)
        yield name, backend


def check(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Compare every backend with the float64 reference at odd sizes and three head_dims."""
    for name, _ in usable(args):
        if name == "reference":
            continue
        for kind, head_dim in product(args.dtypes, args.head_dims):
            row: dict[str, Any] = {"backend": name, "dtype": kind, "head_dim": head_dim}
            start, dtype = time.time(), getattr(torch, kind)
            try:
                backend = SPARSE_BACKENDS[name](torch.device("cuda"), dtype, head_dim, 128)
                errors = {size: error(backend, *size, head_dim, dtype) for size in SIZES}
                size = max(errors, key=errors.__getitem__)
                row |= {"worst_error": round(errors[size], 5), "queries, keys": size}
                row["correct"] = errors[size] < TOLERANCE
            except Exception as failure:
                row["worst_error"] = f"{type(failure).__name__}: {failure}"[:200]
            row["s"] = round(time.time() - start, 1)
            print(row, flush=True)
            yield row


@torch.no_grad()
def error(
    backend: SparseBackend, queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> float:
    """Return ‖out − ref‖ / ‖ref‖ on random lists, two rows, four heads per group."""
    q, k, v = states(queries, keys, rows=2, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype)
    lists, params = random_lists(queries, keys, 0.3, rows=2, heads=8), AttentionParams(0.1)
    found = backend.attend(q, k, v, lists, params)
    wanted = ReferenceSparse().attend(q.double(), k.double(), v.double(), lists, params)
    return float((found - wanted).norm() / wanted.norm())


def attention(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Time dense and block-sparse attention of one layer."""
    sparse = {name: backend for name, backend in usable(args) if name != "reference"}
    for length in args.lengths:
        layer = states(length, length)
        dense = dict(dense_calls(*layer))
        for name, call in dense.items():
            yield timed(name, length, 1.0, call, args.repeats)
        for wanted in args.densities:
            lists = random_lists(length, length, wanted)
            share = float(density(lists, length, length).mean())
            for name, call in sparse_calls(sparse, layer, lists).items():
                yield timed(name, length, share, call, args.repeats)


def dense_calls(q: Tensor, k: Tensor, v: Tensor) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Yield the dense backends worth comparing with."""
    for name in ("sdpa", "flash-attn-4"):
        try:
            backend = BACKENDS[name](torch.device("cuda"), q.dtype)
        except Exception as failure:
            print(f"dense {name}: not usable: {failure}", flush=True)
            continue
        yield f"dense {name}", partial(backend.attend, q, k, v, PARAMS)


def sparse_calls(
    sparse: dict[str, SparseBackend], layer: tuple[Tensor, ...], lists: BlockLists
) -> dict[str, Callable[[], Any]]:
    """Return the sparse backends and the stand-in for published kernels."""
    from sparse_published import published_design

    q, k, v = layer
    calls: dict[str, Callable[[], Any]] = {
        name: partial(backend.attend, q, k, v, lists, PARAMS) for name, backend in sparse.items()
    }
    for keys in (64, 128):
        name = f"published design 128x{keys} (stand-in)"
        calls[name] = partial(published_design, q, k, v, lists, SCALING, keys)
    return calls


def timed(
    name: str, length: int, share: float, call: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    """Return the median time of a call, or why it failed."""
    row: dict[str, Any] = {"kernel": name, "tokens": length, "density": round(share, 4)}
    try:
        call()
        ms = statistics.median(milliseconds(call, repeats=2, warm_up=1) for _ in range(repeats))
        work = 2 * length**2 * HEAD_DIM * HEADS * share
        row |= {"ms": round(ms, 3), "tflops": round(work / ms / 1e9)}
    except Exception as failure:
        row |= {"ms": f"{type(failure).__name__}: {failure}"[:160], "tflops": ""}
    print(row, flush=True)
    return row


def tiles() -> list[SparseTile]:
    """Return the variants of the Triton kernel worth a try on Hopper."""
    shapes = (
        (128, 64, 8, 2, 128), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 2, 128), (128, 32, 8, 3, 128),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3),
    )  # fmt: skip
    found = [SparseTile(*shape, descriptors=True) for shape in shapes]
    found += [
        SparseTile(128, 64, 8, 2, 128, True, False),
        SparseTile(128, 128, 8, 2, None, True, False),
    ]
    pointers = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 4, 2))
    return found + [SparseTile(*shape) for shape in pointers]


def variants(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Check and time variants of the Triton kernel; the fastest last."""
    start, candidates = time.time(), tiles()
    workers = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        errors = list(pool.map(_try_variant, candidates))
    print(f"compiled and checked {len(candidates)} variants in {time.time() - start:.0f} s")
    cases = [(length, wanted) for length in args.lengths for wanted in (0.1, 0.3)][:3]
    rows: Rows = []
    call: Callable[[], Any]
    for length, wanted in cases:
        layer, lists = states(length, length), random_lists(length, length, wanted)
        share = float(density(lists, length, length).mean())
        for tile, worst in zip(candidates, errors, strict=True):
            name = str(tile).removeprefix("SparseTile")
            if not isinstance(worst, float) or not worst < TOLERANCE:
                rows.append({"kernel": name, "tokens": length, "ms": f"error {worst}"[:120]})
                continue
            call = partial(TritonSparse(tile).attend, *layer, lists, PARAMS)
            rows.append(timed(name, length, share, call, 2))
        for keys, call in sparse_calls({}, layer, lists).items():
            rows.append(timed(keys, length, share, call, 2))
    return sorted(rows, key=lambda row: (row["tokens"], -float(row.get("tflops") or 0)))


def _try_variant(tile: SparseTile) -> float | str:
    """Compile a variant in a process of its own and return its error."""
    try:
        sizes = ((4096, 4096), (129, 1000))
        worst = max(error(TritonSparse(tile), *size, 128, torch.bfloat16) for size in sizes)
        # the program that is timed: divisible lengths are another specialisation
        TritonSparse(tile).attend(*states(8192, 8192), random_lists(8192, 8192, 0.1), PARAMS)
        torch.cuda.synchronize()
        return worst
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def table(rows: Rows) -> str:
    """Format rows as Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in rows]
    if any("published" in str(row.get("kernel")) for row in rows):
        lines.append(
            f"\nThe published design is a stand-in written here; the published FlexPrefill kernel"
            f" itself was measured at {PUBLISHED_TFLOPS} TFLOP/s at 128K (another run)."
        )
    return "\n".join(lines)
