"""Time the packing of KIVI's cache, and count the rows that fit beside a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from kivi_cases import HEAD_DIM, KV_HEADS, draw
from measure import milliseconds
from torch import Tensor

from kvdock_kivi import kernels, writing
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed


def time_packing(geometry: Geometry, length: int) -> dict[str, Any]:
    """Time the packing of a prompt, a new token and a whole window; compare the bytes."""
    rows = slice(0, 1)
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
        "what": f"kivi-{geometry.bits} packing",
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
