"""Write summaries as CSV for other programs: each task, the means with costs, and needle depths."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvdock_bench.columns import Column
from kvdock_bench.escaping import spreadsheet
from kvdock_bench.scores import Score
from kvdock_bench.statistics import Paired
from kvdock_bench.summary import Cost, Summary

_COLUMN = ("benchmark", "run", "key", "method", "budget")
_SCORE = ("status", "score", "standard_error", "n", "planned")
_PAIRED = ("difference", "low", "high", "p", "within_noise")
_COST = (
    *("ttft_s", "ms_per_token", "peak_bytes", "kv_bytes", "kv_ratio"),
    *("prompt_tokens", "perplexity"),
)


def csv_files(summaries: Sequence[Summary]) -> dict[str, str]:
    """Return the files' contents by name; depths.csv only where depths are known."""
    files = {
        "summary.csv": _text(
            (*_COLUMN, "length", "task", *_SCORE, *_PAIRED, "data_source"), _tasks(summaries)
        ),
        "means.csv": _text(
            (*_COLUMN, "length", "group", *_SCORE, *_PAIRED, *_COST), _means(summaries)
        ),
    }
    if any(summary.depths for summary in summaries):
        files["depths.csv"] = _text((*_COLUMN, "depth", "length", "score", "n"), _depths(summaries))
    return files


def _tasks(summaries: Iterable[Summary]) -> Iterator[list[Any]]:
    for summary, column in _columns(summaries):
        for length in summary.board.lengths:
            for task in summary.board.tasks:
                place = column.key, length, task
                yield [
                    *_names(summary, column),
                    *(length, spreadsheet(task)),
                    *_score(summary.task_scores[place]),
                    *_paired(summary.task_paired[place]),
                    spreadsheet(summary.data_sources.get(task, "")),
                ]


def _means(summaries: Iterable[Summary]) -> Iterator[list[Any]]:
    for summary, column in _columns(summaries):
        for group in summary.groups:
            for length in summary.board.lengths:
                place = column.key, length, group
                yield [
                    *_names(summary, column),
                    *(length, spreadsheet(group)),
                    *_score(summary.scores[place]),
                    *_paired(summary.paired[place]),
                    *_cost(summary.costs[column.key, length]),
                ]
            yield [
                *_names(summary, column),
                *("all", spreadsheet(group)),
                *_score(summary.averages[column.key, group]),
                *_paired(summary.paired[column.key, None, group]),
                *("" for _ in _COST),
            ]


def _depths(summaries: Iterable[Summary]) -> Iterator[list[Any]]:
    for summary in summaries:
        for found in summary.depths:
            for depth, cells in zip(found.rows, found.cells, strict=True):
                for length, cell in zip(found.lengths, cells, strict=True):
                    if cell is not None:
                        names = _names(summary, summary.board.column(found.key))
                        yield [*names, depth, length, f"{cell[0]:.4f}", cell[1]]


def _columns(summaries: Iterable[Summary]) -> Iterator[tuple[Summary, Column]]:
    for summary in summaries:
        for column in summary.board.columns:
            yield summary, column


def _names(summary: Summary, column: Column) -> list[str]:
    runs = "+".join(run.tag for run in column.runs)
    names = summary.board.benchmark, runs, column.key, column.label, column.budget or ""
    return [*map(spreadsheet, names)]


def _score(score: Score) -> list[Any]:
    numbers = (score.value, score.error)
    return [score.status, *map(_number, numbers), score.n, score.planned]


def _paired(pair: Paired | None) -> list[Any]:
    if pair is None:
        return [""] * len(_PAIRED)
    numbers = (pair.difference, pair.low, pair.high)
    return [*map(_number, numbers), f"{pair.p:.3g}", "yes" if pair.within_noise else "no"]


def _cost(cost: Cost) -> list[str]:
    return [_number(getattr(cost, name)) for name in _COST]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(head)
    lines.writerows(rows)
    return text.getvalue()
