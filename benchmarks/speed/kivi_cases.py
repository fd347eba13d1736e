"""What the scripts on KIVI's kernels share: shapes, packed caches, float64, errors, compilation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class Case:
    """Say what attends to what.

    Args:
        lengths: tokens of every row. group: query heads of a key/value head.
        size: of the queries; 1 is the usual one. tuning: None for the default.
    """

    geometry: Geometry
    lengths: tuple[int, ...] = (1024,)
    queries: int = 1
    group: int = HEADS // KV_HEADS
    dim: int = HEAD_DIM
    dtype: torch.dtype = torch.bfloat16
    size: float = 1
    tuning: Tuning | None = None

    def __str__(self) -> str:
        kind = self.geometry
        layout = f"{kind.bits} bits g={kind.group} R={kind.residual} D={self.dim} G={self.group}"
        rest = f"{list(self.lengths)} Q={self.queries} q×{self.size:g} {str(self.dtype)[6:]}"
        return f"{layout} {rest}"


def guarded(run: Callable[[], Any]) -> Any:
    """Return the result, or the error as a text, so that one failure does not hide the rest."""
    try:
        return run()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(text[:400], flush=True)
        return text


def compile_all(cases: Iterable[Case]) -> None:
    """Compile variants in processes of their own, into Triton's cache on disk."""
    started, jobs = time.perf_counter(), list(cases)
    with ProcessPoolExecutor(16, mp_context=get_context("spawn")) as pool:
        for job, text in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if text:
                print(f"{job}: {text[:200]}", flush=True)
    print(f"compiled {len(jobs)} variants in {time.perf_counter() - started:.0f} s", flush=True)


def compile_one(case: Case) -> str:
    """Run one variant on a small cache; return the error if it cannot run."""
    length, dim = 1024, case.dim
    like = torch.empty(0, dtype=case.dtype, device="cuda")
    cache = Packed.empty(case.geometry, (1, KV_HEADS), length, (dim, dim, dim), like)
    q = draw(1, KV_HEADS * case.group, case.queries, dim, dtype=case.dtype)
    row = torch.zeros(1, dtype=torch.int32, device="cuda")
    size = torch.full((1,), length, dtype=torch.int32, device="cuda")
    try:
        attend(cache, case.geometry, q, q, row, size, length, 1.0, held=1, tuning=case.tuning)
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
            scores = q[row, heads].double() @ key.T * q.shape[-1] ** -0.5
            levels.append(scores.logsumexp(-1))
            outputs.append(scores.softmax(-1) @ value)
    return torch.stack(outputs).view(*q.shape), torch.stack(levels).view(q.shape[:3])


def errors(case: Case) -> dict[str, Any]:
    """Return the largest errors against float64 over the same dequantised numbers."""
    batch, room, dim = len(case.lengths), max(case.lengths), case.dim
    q = draw(batch, KV_HEADS * case.group, case.queries, dim, seed=1, dtype=case.dtype)
    q = q * case.size
    k, v = (draw(batch, KV_HEADS, room, dim, seed=seed, dtype=case.dtype) for seed in (2, 3))
    k[..., 5] += 8  # a channel of its own range
    lengths = list(case.lengths)
    cache = packed(case.geometry, k, v, lengths)
    wanted, level = exact(cache, case.geometry, q, k, v, lengths)
    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    sizes = torch.tensor(lengths, dtype=torch.int32, device="cuda")

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        numbers = (rows, sizes, room, dim**-0.5)
        return attend(cache, case.geometry, q, q, *numbers, held=0, dtype=dtype, tuning=case.tuning)

    found, lse = run(torch.float32)
    again, _ = run(torch.float32)
    answer, _ = run(case.dtype)
    row = {
        "case": str(case),
        "output": (found - wanted).abs().max().item(),
        "answer": (answer - wanted).abs().max().item(),
        "rounding": (wanted.to(case.dtype) - wanted).abs().max().item(),
        "lse": (lse - level).abs().max().item(),
        "peak": wanted.abs().max().item(),
        "same": torch.equal(found, again),
    }
    numbers_ = " ".join(f"{name} {row[name]:.1e}" for name in list(row)[1:-1])
    print(f"{row['case']:<72} {numbers_} {'' if row['same'] else 'NOT the same twice'}", flush=True)
    return row


def filled(geometry: Geometry, length: int, batch: int) -> Packed:
    """Return a cache of one layer, full of random codes."""
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    dims = (HEAD_DIM, HEAD_DIM, HEAD_DIM)
    cache = Packed.empty(geometry, (batch, KV_HEADS), length, dims, like)
    for tensor in cache.tensors().values():
        if tensor.dtype == torch.int16:
            tensor.random_(-32768, 32767)
        else:
            tensor.uniform_(0.1, 1)
    return cache
