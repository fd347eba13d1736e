"""The projections of the Llama-3.1-8B shape and the tilings that are tried on them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.kernels.overlap import starting
from kvdock.kernels.products_triton import Tile, gated_product, products
from kvdock.kernels.step_triton import gated


@dataclass(frozen=True)
class Group:
    """Name weights that share their input."""

    name: str
    outputs: tuple[int, ...]
    inputs: int
    gated: bool = False
    copies: int = 32

    @property
    def bytes(self) -> int:
        """Return the bytes of one layer's weights."""
        return 2 * sum(self.outputs) * self.inputs

    def library(self, states: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Compute it as a captured step does without these kernels."""
        made = [F.linear(states, weight) for weight in weights]
        with starting(early=False):
            return [gated(*made)] if self.gated else made

    def kernel(self, states: Tensor, weights: list[Tensor], choice: Choice) -> list[Tensor]:
        """Compute it by one kernel."""
        biases, more = [None] * len(weights), {"lanes": choice.lanes, "early": choice.early}
        with choice.order():
            if self.gated:
                return [gated_product(states, weights, biases, choice.tile, **more)]
            return products(states, weights, biases, choice.tile, **more)


class Choice(NamedTuple):
    """Name one compiled kernel."""

    tile: Tile
    lanes: bool
    early: bool

    def order(self) -> AbstractContextManager[None]:
        """Return the context to launch it in."""
        return starting(self.early)

    def __str__(self) -> str:
        tile = self.tile
        kind = "lanes" if self.lanes else "cores"
        ahead = f" a{tile.ahead}" if tile.ahead else ""
        early = " early" if self.early else ""
        return f"{kind} {tile.outputs}x{tile.inputs} w{tile.warps} s{tile.stages}{ahead}{early}"


GROUPS = [
    Group("q+k+v", (4096, 1024, 1024), 4096),
    Group("o", (4096,), 4096),
    Group("gate+up", (14_336, 14_336), 4096, gated=True),
    Group("down", (4096,), 14_336),
    Group("head", (128_256,), 4096, copies=1),
]
LANES = [
    Tile(2, 1024, 4), Tile(4, 1024, 4), Tile(8, 1024, 4), Tile(2, 2048, 8), Tile(4, 2048, 8),
    Tile(4, 512, 2), Tile(8, 512, 2), Tile(2, 4096, 16), Tile(1, 2048, 4), Tile(8, 1024, 8),
]  # fmt: skip
GATED_LANES = [
    Tile(1, 1024, 4), Tile(2, 1024, 4), Tile(4, 1024, 4), Tile(1, 2048, 8), Tile(2, 2048, 8),
    Tile(2, 512, 2), Tile(4, 512, 2), Tile(2, 4096, 16), Tile(4, 1024, 8),
]  # fmt: skip
CORES = [
    Tile(16, 256, 2, 4, 1024), Tile(16, 256, 4, 4, 1024), Tile(16, 512, 4, 3, 1024),
    Tile(32, 128, 2, 5, 1024), Tile(32, 128, 4, 4, 1024), Tile(32, 256, 4, 3, 1024),
    Tile(32, 256, 4, 4, 1024), Tile(64, 64, 4, 6, 1024), Tile(64, 128, 4, 4, 1024),
    Tile(64, 128, 4, 5, 1024), Tile(128, 64, 4, 5, 1024), Tile(16, 256, 4, 4),
    Tile(16, 256, 4, 4, 4096),
]  # fmt: skip
GATED_CORES = [
    Tile(16, 128, 2, 4, 1024), Tile(16, 128, 4, 5, 1024), Tile(16, 256, 2, 3, 1024),
    Tile(16, 256, 4, 3, 1024), Tile(16, 256, 4, 4, 1024), Tile(32, 128, 4, 3, 1024),
    Tile(32, 128, 4, 4, 1024), Tile(32, 64, 4, 6, 1024), Tile(64, 64, 4, 5, 1024),
    Tile(64, 128, 4, 3, 1024), Tile(16, 256, 4, 3), Tile(16, 256, 4, 3, 4096),
]  # fmt: skip


def choices(gated: bool, rows: int) -> list[Choice]:
    """Return the kernels that are tried at this many rows."""
    lanes, cores = (GATED_LANES, GATED_CORES) if gated else (LANES, CORES)
    tried = [(tile, True) for tile in lanes] if rows == 1 else []
    # one row on tensor cores wastes nothing either, since reading bounds it
    tried += [(tile, False) for tile in (cores[:5] if rows == 1 else cores)]
    return [Choice(*one, early) for one in tried for early in (True, False)]


def compile_one(job: tuple[bool, Choice]) -> str:
    """Compile one kernel into Triton's cache on disk; return the error, if there is one."""
    gated, choice = job
    group = Group("small", (256, 256) if gated else (256, 128, 64), 4096, gated)
    try:
        rows = 1 if choice.lanes else 2
        states = torch.randn(rows, 1, group.inputs, device="cuda", dtype=torch.bfloat16)
        weights = [
            torch.randn(n, group.inputs, device="cuda", dtype=torch.bfloat16) for n in group.outputs
        ]
        found = group.kernel(states, weights, choice)
        error = worst(group, found, states, weights)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return "" if error < 3 else f"off by {error:.1f} units"


def worst(group: Group, found: list[Tensor], states: Tensor, weights: list[Tensor]) -> float:
    """Return the largest difference from float32 sums, in last places of the largest value."""
    wanted = [states.float() @ weight.float().T for weight in weights]
    if group.gated:
        gate, up = (part.bfloat16() for part in wanted)
        wanted = [(F.silu(gate) * up).float()]
    unit = torch.finfo(torch.bfloat16).eps
    pairs = zip(found, wanted, strict=True)
    return max(((f.float() - w).abs().max() / w.abs().max() / unit).item() for f, w in pairs)
