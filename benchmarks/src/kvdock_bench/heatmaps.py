"""Lay scores out as shaded grids: methods by task, and a needle's depth by length."""

from __future__ import annotations

from dataclasses import dataclass

from kvdock_bench.depths import DepthMap
from kvdock_bench.scores import Score
from kvdock_bench.summary import Summary
from kvdock_bench.tables import length_name, score_text


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A number and its shade.

    Args:
        shade: from 0 to 1; None leaves the cell blank.
        hint: what the number leaves out, shown where one points.
    """

    text: str
    shade: float | None
    hint: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A titled grid of shaded numbers; the first name of the head belongs to the rows' names."""

    title: str
    head: list[str]
    rows: list[tuple[str, list[HeatCell]]]


def task_heatmaps(summary: Summary) -> list[HeatMap]:
    """Return one grid per length, a row per method; none for a single task."""
    board = summary.board
    if len(board.tasks) < 2:
        return []
    maps = []
    for length in board.lengths:
        rows = [
            (
                column.label,
                [_score_cell(summary.task_scores[column.key, length, t]) for t in board.tasks],
            )
            for column in board.columns
        ]
        # a method that has nothing here would be an empty line
        rows = [(name, cells) for name, cells in rows if any(cell.text for cell in cells)]
        if rows:
            maps.append(HeatMap(length_name(length), ["Method", *board.tasks], rows))
    return maps


def depth_heatmap(found: DepthMap) -> HeatMap:
    """Return the grid of one method: a row per depth, a column per length."""
    rows = [
        (
            name,
            [
                HeatCell("", None, "no answer")
                if cell is None
                else HeatCell(f"{cell[0]:.0f}", cell[0] / 100, f"{cell[0]:.1f} %, n={cell[1]}")
                for cell in cells
            ],
        )
        for name, cells in zip(found.rows, found.cells, strict=True)
    ]
    return HeatMap(found.label, ["Depth", *map(length_name, found.lengths)], rows)


def _score_cell(score: Score) -> HeatCell:
    hint = f"{score_text(score)}, n={score.n}" if score.value is not None else score.status
    if score.value is None:
        return HeatCell(score_text(score), None, hint)
    return HeatCell(f"{score.value:.0f}", score.value / 100, hint)
