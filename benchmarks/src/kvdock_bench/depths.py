"""Map where in the haystack a single needle is found, by depth and length."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvdock_bench.columns import Board
from kvdock_bench.record import Record

BINS = 10
_MOST_EXACT = 11


@dataclass(frozen=True, slots=True)
class DepthMap:
    """Mean accuracy in percent of one column's single-needle answers.

    Args:
        rows: names of the depths, from the start of the prompt to its end.
        cells: by row and length the mean and the number of answers; None without one.
    """

    key: str
    label: str
    rows: tuple[str, ...]
    lengths: tuple[int, ...]
    cells: list[list[tuple[float, int] | None]]


def depth_maps(board: Board, tasks: Collection[str]) -> list[DepthMap]:
    """Return a map per column over some tasks, none when no record says where its needle lies.

    Answers about several needles are left out: their score does not tell which one was missed.
    """
    found = {
        column.key: [
            (depth, record.length, record.score)
            for (_, task), cell in column.cells.items()
            if task in tasks
            for record in cell
            if record.score is not None and (depth := _depth(record)) is not None
        ]
        for column in board.columns
    }
    depths = sorted({depth for samples in found.values() for depth, _, _ in samples})
    if not depths:
        return []
    lengths = tuple(
        n for n in board.lengths if any(n == m for samples in found.values() for _, m, _ in samples)
    )
    exact = len(depths) <= _MOST_EXACT
    names = [f"{depth:.0%}" for depth in depths] if exact else _bin_names()
    maps = []
    for column in board.columns:
        sums: dict[tuple[int, int], list[float]] = {}
        for depth, length, score in found[column.key]:
            row = depths.index(depth) if exact else min(int(depth * BINS), BINS - 1)
            sums.setdefault((row, length), []).append(100 * score)
        grid = [
            [_mean(sums.get((row, length), [])) for length in lengths] for row in range(len(names))
        ]
        maps.append(DepthMap(column.key, column.label, tuple(names), lengths, grid))
    return maps


def _depth(record: Record) -> float | None:
    depths = record.meta.get("depths", [record.meta.get("depth")])
    return float(depths[0]) if len(depths) == 1 and depths[0] is not None else None


def _bin_names() -> list[str]:
    width = 100 // BINS
    return [f"{width * n}–{width * (n + 1)}%" for n in range(BINS)]


def _mean(values: list[float]) -> tuple[float, int] | None:
    return (sum(values) / len(values), len(values)) if values else None
