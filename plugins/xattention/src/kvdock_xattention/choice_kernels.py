"""From levels to lists in Triton: a softmax over key blocks, the threshold rule, the lists.

A program owns one block row of queries. It adds the softmax of its tiles, finds by bisection over
the bits of a float the smallest mass that is still kept, and writes the row's list; a mass is a
sum of probabilities, so its bits order as it does.

Shapes: M block rows, Nk key blocks, W list width.
"""

# ruff: noqa: ANN001, ANN202  (a kernel's arguments are the compiler's values, not Python's)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvdock.kernels.blocks import BlockLists
from kvdock_xattention.grid import TileGrid
from kvdock_xattention.score import Part

COUNTS = (
    "first_row", "origin", "empty", "tiles", "blocks", "first_block", "loose", "part_tiles",
    "first_head", "rows", "threshold_heads",
)  # fmt: skip
"""What changes from prompt to prompt: a kernel is not compiled again for it."""
LARGEST = 0x7F800000  # the bits of +inf: no mass is larger


@triton.jit
def _mass(
    level, level_row, tile, tiles_end, empty, origin, last, column, part_tiles,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Add the softmax over key blocks of a block row's tiles, and of the heads that share it."""
    mass = tl.zeros([WIDTH], tl.float32)
    for share in range(SHARE):
        for r in range(PER_BLOCK):
            here = tile + r
            real = (here >= empty) & (here < tiles_end)
            row = share * tl.cast(part_tiles, tl.int64) + (here - origin)
            seen = (column <= last) & real
            found = tl.load(level + row * level_row + column, mask=seen, other=float("-inf"))
            top = tl.max(found, 0)
            top = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2(found - top)
            total = tl.sum(weight, 0)
            mass += weight / tl.where(total > 0.0, total, 1.0)
    return mass


@triton.jit
def _kept(mass, candidate, base, need, LARGEST: tl.constexpr):
    """Keep the largest candidates, lower first among equals, while their predecessors miss need."""
    bits = mass.to(tl.int32, bitcast=True)
    low, high = base.to(tl.int32) * 0 - 1, base.to(tl.int32) * 0 + LARGEST
    for _ in range(32):
        middle = low + (high - low) // 2
        before = base + tl.sum(tl.where(candidate & (bits > middle), mass, 0.0), 0)
        fits = before < need
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    # only masses of exactly these bits are kept in part
    edge = candidate & (bits == high)
    value = tl.max(tl.where(edge, mass, 0.0), 0)
    before = base + tl.sum(tl.where(candidate & (bits > high), mass, 0.0), 0)
    rank = tl.cumsum(edge.to(tl.int32), 0) - 1
    some = edge & (before + rank.to(tl.float32) * value < need)
    return (candidate & (bits > high)) | some


@triton.jit(do_not_specialize=COUNTS)
def _choose(
    level, level_row, mass_out, thresholds, count, index,
    first_row, origin, empty, tiles, blocks, first_block, loose, part_tiles,
    first_head, rows, threshold_heads,
    WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, SHARE: tl.constexpr, KEEP_MASS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Write one row's list; rows of absolute blocks below ``loose`` follow the compat rule.

    ``first_head`` is the part's first head over all rows of the batch. With SHARE > 1 a program
    serves that many heads.
    """
    row = first_row + tl.num_programs(0) - 1 - tl.program_id(0)
    local = tl.program_id(1) * SHARE
    column = tl.arange(0, WIDTH)
    last = first_block + row
    level += tl.cast(local, tl.int64) * part_tiles * level_row
    mass = _mass(
        level, level_row, row * PER_BLOCK, tiles, empty, origin, last, column, part_tiles,
        WIDTH, PER_BLOCK, SHARE,
    )  # fmt: skip
    causal = column <= last
    total = tl.sum(mass, 0)
    sink = tl.sum(tl.where(column == 0, mass, 0.0), 0)
    own = tl.sum(tl.where((column == last) & (column > 0), mass, 0.0), 0)
    is_loose = last < loose
    base = tl.where(is_loose, tl.where(last == 0, sink, own), sink + own)
    forced = (column == 0) | (column == last)
    candidate = causal & (column != last) & (is_loose | (column != 0))
    for share in range(SHARE):
        head = first_head + local + share
        threshold = tl.load(thresholds + head % threshold_heads)
        need = tl.where(threshold < 1.0, total * threshold, float("inf"))
        kept = _kept(mass, candidate, base, need, LARGEST)
        # the compat rule counts a block that it does not force, and so keeps one more
        rest = tl.where(candidate & (kept == 0), mass, -1.0)
        next_one = tl.argmax(rest, 0)
        extra = is_loose & (need > 0.0) & (column == next_one) & (rest >= 0.0)
        kept = (kept | forced | extra) & causal
        line = tl.cast(head, tl.int64) * rows + row
        chosen = tl.cumsum(kept.to(tl.int32), 0)
        number = tl.sum(kept.to(tl.int32), 0)
        place = tl.where(kept, chosen - 1, number + column - chosen)
        tl.store(index + line * blocks + place, column, mask=column < blocks)
        tl.store(count + line, number)
        if KEEP_MASS:
            tl.store(mass_out + line * blocks + column, mass, mask=column < blocks)


def choose(
    level: Tensor,
    thresholds: Tensor,
    lists: BlockLists,
    grid: TileGrid,
    part: Part,
    tiles_per_group: int,
    *,
    loose: int,
    share: int,
    mass: Tensor | None = None,
    warps: int | None = None,
) -> None:
    """Fill the lists of one part of the work.

    Args:
        level: float32 [heads of the part, tiles of the part, ≥ Nk], from `score.score`.
        thresholds: float32 [1] or [H].
        loose: absolute blocks below this follow the compat rule.
        share: heads whose masses are added and who get one list, 1 or G.
        mass: float32 [b, H, M, Nk], filled with the masses where given.
    """
    rows, blocks = lists.index.shape[2:]
    origin = part.low * tiles_per_group
    end = min(part.high * tiles_per_group, grid.query_tiles)
    first_row, rows_here = origin // grid.per_block, -(-(end - origin) // grid.per_block)
    width = max(16, triton.next_power_of_2(blocks))
    warps = warps or max(1, min(8, width // 1024))
    group = level.shape[0] // part.pairs
    _choose[(rows_here, level.shape[0] // share)](
        level, level.stride(1), level if mass is None else mass, thresholds,
        lists.count, lists.index,
        first_row, origin, grid.empty, grid.query_tiles, blocks, grid.blocks.first, loose,
        level.shape[1], part.pair * group, rows, thresholds.numel(),
        WIDTH=width, PER_BLOCK=grid.per_block, SHARE=share, KEEP_MASS=mass is not None,
        LARGEST=LARGEST, num_warps=warps,
    )  # fmt: skip
