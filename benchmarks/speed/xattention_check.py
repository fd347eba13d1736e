"""XAttention's kernels against plain torch, on planted queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvdock.kernels.blocks import mask_from_lists
from kvdock.policy import AttentionParams
from kvdock_xattention.grid import TileGrid
from kvdock_xattention.options import XAttentionOptions
from kvdock_xattention.pipeline import select_by_kernels
from kvdock_xattention.reference import block_mass, chosen_blocks
from kvdock_xattention.score import Shape
from kvdock_xattention.select import select, select_reference

PAIR = Shape(128, 128, 64, 4, 3, descriptors=True)


def planted(
    rows: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return queries and keys [b, H or K, T, D], laid out as a model's: tokens before heads."""
    generator = torch.Generator("cuda").manual_seed(length)
    half = head_dim // 2
    angle = torch.arange(length, device="cuda")[:, None] * (
        5e5 ** -(torch.arange(half, device="cuda") / half)
    )
    cos, sin = angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]
    common = torch.randn(head_dim, generator=generator, device="cuda")

    def draw(count: int, noise: float, heavy: bool) -> Tensor:
        out = torch.empty(rows, length, count, head_dim, dtype=dtype, device="cuda")
        for head in range(count):  # one at a time: float32 noise of all heads would not fit
            shape = (rows, length, head_dim)
            states = torch.randn(shape, generator=generator, device="cuda") * noise + common
            if heavy:
                states[:, 0] += common
                states[:, ::512] += common
            out[:, :, head] = states.to(dtype)
        low, high = out[..., :half], out[..., half:]
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        return turned.transpose(1, 2)

    return draw(heads, 1.0, False), draw(kv_heads, 1.0, True)


def check(lengths: list[int]) -> list[dict[str, Any]]:
    """Compare masses and lists with plain torch; print what differs and never stop."""
    rows = []
    kinds = ((64, torch.float16), (128, torch.bfloat16))
    cases = [(n, *kind, stride) for n in lengths for kind in kinds for stride in (4, 8, 16)]
    cases += [(4097, 64, torch.bfloat16, 8), (4097, 128, torch.float16, 8)]
    print(f"{'case':>34} {'mass off':>9} {'own rule':>9} {'lists off':>9} {'of':>8} {'lost':>10}")
    for length, head_dim, dtype, stride in cases:
        q, k = planted(1, 4, 2, length, head_dim, dtype)
        for queries, kind in ((length, "tma"), (length, "ptr"), (length * 2 // 3 + 5, "tma")):
            if length > 10_000 and kind == "ptr" and stride != 8:
                continue
            name = f"{queries}/{length} {head_dim} {str(dtype)[6:]} S{stride} {kind}"
            try:
                shape = replace(PAIR, descriptors=kind == "tma")
                row = compare(q[:, :, length - queries :], k, stride, shape)
            except Exception as error:
                print(f"{name:>34} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
                rows.append({"case": name, "failed": str(error)[:300]})
                continue
            bad = row["mass"] > 1e-3 or row["rule"] or row["lost"] > 1e-3
            rows.append({"case": name, **row})
            print(
                f"{name:>34} {row['mass']:9.1e} {row['rule']:9} {row['lists']:9} {row['all']:8}"
                f" {row['lost']:10.1e}{'  BAD' if bad else ''}",
                flush=True,
            )
    return rows


def check_whole() -> list[dict[str, Any]]:
    """Compare `select` with plain torch where defaults decide: head dims, rows, rules, float32."""
    table = tuple(0.3 + 0.02 * head for head in range(28))
    cases: list[tuple[tuple[int, ...], int, torch.dtype, dict[str, Any]]] = [
        ((1, 32, 8, 8192, 128), 8192, torch.bfloat16, {}),
        ((2, 28, 4, 6000, 128), 5000, torch.bfloat16, {"threshold": table}),
        ((1, 32, 32, 9000, 96), 9000, torch.float16, {"stride": 16}),
        ((1, 8, 1, 20_000, 80), 777, torch.bfloat16, {}),
        ((1, 8, 2, 5000, 64), 5000, torch.float32, {"stride": 4}),
        ((1, 32, 8, 33_001, 128), 33_001, torch.bfloat16, {"mode": "compat", "stride": 16}),
        ((2, 16, 4, 12_345, 128), 12_345, torch.bfloat16, {"share_group": True}),
        ((1, 32, 8, 65_537, 128), 65_537, torch.bfloat16, {}),
    ]
    rows = []
    for shape, queries, dtype, changes in cases:
        name = f"{queries}/{shape} {str(dtype)[6:]} " + " ".join(
            f"{key}={value if key != 'threshold' else 'table'}" for key, value in changes.items()
        )
        try:
            q, k = planted(*shape, dtype)
            call = (q[:, :, shape[3] - queries :], k, AttentionParams(shape[4] ** -0.5))
            options = XAttentionOptions(**changes)
            blocks = -(-shape[3] // 128)
            found = mask_from_lists(select(*call, options), blocks)
            wanted = mask_from_lists(select_reference(*call, options), blocks)
            row = {"case": name, "lists": int((found != wanted).sum()), "all": int(wanted.sum())}
        except Exception as error:
            row = {"case": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
        rows.append(row)
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        torch.cuda.empty_cache()
    return rows


def compare(q: Tensor, k: Tensor, stride: int, shape: Shape) -> dict[str, Any]:
    """Return how far masses and lists of the kernels are from plain torch."""
    grid = TileGrid(q.shape[2], k.shape[2], stride)
    blocks, scaling = grid.blocks, q.shape[-1] ** -0.5
    threshold = torch.tensor([0.5, 0.9, 0.95, 0.9], device="cuda")
    mass = torch.zeros(*q.shape[:2], blocks.rows, blocks.key_blocks, device="cuda")
    lists = select_by_kernels(q, k, scaling, grid, threshold, shape=shape, mass=mass)
    found = mask_from_lists(lists, blocks.key_blocks)
    exact = block_mass(q, k, scaling, grid)
    wanted = chosen_blocks(exact, blocks.first, threshold)
    own = chosen_blocks(mass, blocks.first, threshold)
    total = exact.sum(-1)
    covered = (exact * found).sum(-1) - (exact * wanted).sum(-1)
    return {
        "mass": ((mass - exact).abs().amax(-1) / total).max().item(),
        "rule": int((found != own).sum()),
        "lists": int((found != wanted).sum()),
        "all": int(wanted.sum()),
        "lost": (-covered / total).max().item(),
    }
