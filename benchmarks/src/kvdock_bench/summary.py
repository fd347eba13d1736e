"""Reduce the answers of a board to scores, times, memory and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvdock_bench.columns import Board, Column
from kvdock_bench.depths import DepthMap, depth_maps
from kvdock_bench.errors import BenchError
from kvdock_bench.record import Record
from kvdock_bench.scores import FAILED, Score, average, combine, compare, task_score
from kvdock_bench.statistics import Paired
from kvdock_bench.tasks import get_suite

ALL = "all"


@dataclass(frozen=True, slots=True)
class Cost:
    """Means over the samples of a method at one length; the peak is a maximum.

    Args:
        perplexity: of the words that a likelihood task judges; None where there is none.
    """

    ttft_s: float | None
    ms_per_token: float | None
    peak_bytes: int | None
    kv_bytes: float | None
    kv_ratio: float | None
    prompt_tokens: float | None
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All numbers of a board; keys are column keys, lengths, and task or group names.

    Args:
        groups: task names by group, the headline first; a group "all" is always among them.
        task_paired, paired: differences to each column's full cache; length None is all lengths.
    """

    board: Board
    groups: dict[str, tuple[str, ...]]
    task_scores: dict[tuple[str, int, str], Score]
    task_paired: dict[tuple[str, int, str], Paired | None]
    scores: dict[tuple[str, int, str], Score]
    averages: dict[tuple[str, str], Score]
    paired: dict[tuple[str, int | None, str], Paired | None]
    costs: dict[tuple[str, int], Cost]
    depths: list[DepthMap]
    reasoning_s: dict[str, float]
    data_sources: dict[str, str]

    @property
    def headline(self) -> str:
        """Return the group whose mean stands first."""
        return next(iter(self.groups))

    @property
    def failed(self) -> int:
        """Return the number of cells in which something unexpected went wrong."""
        return sum(score.status == FAILED for score in self.task_scores.values())

    def to_json(self) -> dict[str, Any]:
        """Return the numbers nested by method, group or length, and task."""
        return {
            "schema_version": 2,
            "benchmark": self.board.benchmark,
            "groups": {name: list(tasks) for name, tasks in self.groups.items()},
            "data_sources": self.data_sources,
            "methods": {column.key: self._column(column) for column in self.board.columns},
        }

    def _column(self, column: Column) -> dict[str, Any]:
        key, lengths = column.key, self.board.lengths
        return {
            "label": column.label,
            "runs": [run.tag for run in column.runs],
            "compared_with": column.base,
            **column.method.identity,
            "reasoning_s": self.reasoning_s[key],
            "groups": {
                group: {
                    "average": asdict(self.averages[key, group]),
                    "difference": _dict(self.paired[key, None, group]),
                    "lengths": {
                        str(length): {
                            "score": asdict(self.scores[key, length, group]),
                            "difference": _dict(self.paired[key, length, group]),
                        }
                        for length in lengths
                    },
                }
                for group in self.groups
            },
            "lengths": {
                str(length): {
                    "cost": asdict(self.costs[key, length]),
                    "tasks": {
                        task: {
                            "score": asdict(self.task_scores[key, length, task]),
                            "difference": _dict(self.task_paired[key, length, task]),
                        }
                        for task in self.board.tasks
                    },
                }
                for length in lengths
            },
        }


def summarise(board: Board) -> Summary:
    """Reduce the records of a board."""
    lengths, tasks, groups = board.lengths, board.tasks, groups_of(board.benchmark, board.tasks)
    depths = depth_maps(board, next(iter(groups.values())))
    result = Summary(board, groups, {}, {}, {}, {}, {}, {}, depths, {}, {})
    for column in board.columns:
        key = column.key
        base = board.column(column.base).cells if column.base else {}
        cells, pairs = {}, {}
        for length in lengths:
            for task in tasks:
                place = length, task
                cells[place] = column.cells.get(place, [])
                pairs[place] = base.get(place, []), cells[place]
                result.task_scores[key, length, task] = task_score(
                    cells[place], column.planned.get(place, 0)
                )
                result.task_paired[key, length, task] = compare([[pairs[place]]])
            result.costs[key, length] = _cost([r for task in tasks for r in cells[length, task]])
        for group, members in groups.items():
            for length in lengths:
                result.scores[key, length, group] = combine(
                    [result.task_scores[key, length, task] for task in members],
                    [cells[length, task] for task in members],
                )
                row = [pairs[length, task] for task in members]
                result.paired[key, length, group] = compare([row])
            result.averages[key, group] = average(
                [result.scores[key, length, group] for length in lengths]
            )
            rows = [[pairs[length, task] for task in members] for length in lengths]
            result.paired[key, None, group] = compare(rows)
        found = [record for cell in cells.values() for record in cell]
        result.reasoning_s[key] = sum(r.timings.generate_s for r in found if r.timings)
        sources = {record.task: record.data_source for record in found}
        result.data_sources.update({task: sources[task] for task in tasks if task in sources})
    return result


def groups_of(benchmark: str, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the suite's default group, where the tasks hold it and more, and all tasks."""
    groups = {ALL: tuple(tasks)}
    try:
        suite = get_suite(benchmark)
    except BenchError:
        # a suite of the user's own files, or of a package that is not here
        return groups
    members = suite.groups.get(suite.default, (suite.default,))
    if suite.default != ALL and set(members) < set(tasks):
        return {suite.default: tuple(task for task in tasks if task in members), **groups}
    return groups


def _cost(records: Sequence[Record]) -> Cost:
    timings = [record.timings for record in records if record.timings]
    memory = [record.memory for record in records if record.memory]
    peaks = [use.peak_alloc_bytes for use in memory if use.peak_alloc_bytes is not None]
    # tasks that judge the same words in two ways hold the same likelihood
    likelihoods = {r.prompt_sha: r.meta["nll"] for r in records if r.meta.get("nll") is not None}
    nll = _mean(list(likelihoods.values()))
    per_token = [1e3 * times.tpot_s for times in timings if times.tpot_s is not None]
    return Cost(
        ttft_s=_mean([times.ttft_s for times in timings]),
        ms_per_token=_mean(per_token),
        peak_bytes=max(peaks, default=None),
        kv_bytes=_mean([use.kv_bytes for use in memory]),
        kv_ratio=_mean([use.kv_ratio for use in memory]),
        prompt_tokens=_mean([record.n_prompt_tokens for record in records]),
        perplexity=None if nll is None else _exp(nll),
    )


def _exp(value: float) -> float | None:
    try:
        return math.exp(value)
    except OverflowError:
        return None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _dict(paired: Paired | None) -> dict[str, Any] | None:
    return None if paired is None else asdict(paired) | {"within_noise": paired.within_noise}
