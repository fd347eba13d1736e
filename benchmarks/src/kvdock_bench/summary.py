"""Reduce a run's records to scores, times, memory and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvdock_bench.methods import MethodConfig
from kvdock_bench.plan import Plan
from kvdock_bench.record import OOM, UNFIT, Record
from kvdock_bench.statistics import Mean, Paired, mean_of_groups, paired_difference

OK, PARTIAL, MISSING, FAILED = "ok", "partial", "missing", "failed"


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy in percent; status tells a number from "oom", "does not fit" and "failed"."""

    status: str
    value: float | None
    error: float | None
    n: int
    planned: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Means over the samples of a method at one length; the peak is a maximum."""

    ttft_s: float | None
    ms_per_token: float | None
    peak_bytes: int | None
    kv_bytes: float | None
    kv_ratio: float | None
    prompt_tokens: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All numbers of a report; keys are method ids, lengths and task names."""

    methods: tuple[MethodConfig, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    task_scores: dict[tuple[str, int, str], Score]
    scores: dict[tuple[str, int], Score]
    averages: dict[str, Score]
    costs: dict[tuple[str, int], Cost]
    paired: dict[tuple[str, int | None], Paired | None]
    reasoning_s: dict[str, float]
    data_sources: dict[str, str]

    @property
    def failed(self) -> int:
        """Return the number of cells in which something unexpected went wrong."""
        return sum(score.status == FAILED for score in self.task_scores.values())

    def to_json(self) -> dict[str, Any]:
        """Return the numbers nested by method, length and task."""
        methods = {}
        for method in self.methods:
            name = method.method_id
            methods[name] = {
                "label": method.label,
                **method.identity,
                "average": asdict(self.averages[name]),
                "average_difference": _dict(self.paired.get((name, None))),
                "reasoning_s": self.reasoning_s[name],
                "lengths": {
                    str(length): {
                        "score": asdict(self.scores[name, length]),
                        "difference": _dict(self.paired.get((name, length))),
                        "cost": asdict(self.costs[name, length]),
                        "tasks": {
                            task: asdict(self.task_scores[name, length, task])
                            for task in self.tasks
                        },
                    }
                    for length in self.lengths
                },
            }
        return {"schema_version": 1, "data_sources": self.data_sources, "methods": methods}


def summarise(plan: Plan, records: Iterable[Record]) -> Summary:
    """Reduce the records of a plan; records of anything else must be left out by the caller."""
    lengths = tuple(sorted(plan.config.length))
    tasks = tuple(task.name for task in plan.config.tasks)
    planned = plan.config.num_samples
    cells: dict[tuple[str, int, str], list[Record]] = {
        (cell.method.method_id, cell.length, cell.task.name): [] for cell in plan.cells
    }
    for record in records:
        cells[record.method_id, record.length, record.task].append(record)
    task_scores = {key: _task_score(found, planned) for key, found in cells.items()}
    full = plan.methods[0].method_id
    scores, costs, averages, reasoning = {}, {}, {}, {}
    paired: dict[tuple[str, int | None], Paired | None] = {}
    for method in plan.methods:
        name = method.method_id
        every: list[list[list[float]]] = []
        for length in lengths:
            rows = [cells[name, length, task] for task in tasks]
            scores[name, length] = _combine(
                [task_scores[name, length, task] for task in tasks],
                mean_of_groups([_values(row) for row in rows]),
            )
            costs[name, length] = _cost([record for row in rows for record in row])
            pairs = [
                _differences(cells[full, length, task], cells[name, length, task]) for task in tasks
            ]
            every.append(pairs)
            if not method.is_full:
                paired[name, length] = paired_difference([pairs])
        if not method.is_full:
            paired[name, None] = paired_difference(every)
        averages[name] = _average([scores[name, length] for length in lengths])
        reasoning[name] = sum(
            record.timings.generate_s
            for key, found in cells.items()
            if key[0] == name
            for record in found
            if record.timings
        )
    sources = {record.task: record.data_source for found in cells.values() for record in found}
    return Summary(
        methods=plan.methods,
        lengths=lengths,
        tasks=tasks,
        task_scores=task_scores,
        scores=scores,
        averages=averages,
        costs=costs,
        paired=paired,
        reasoning_s=reasoning,
        data_sources=sources,
    )


def _task_score(records: Sequence[Record], planned: int) -> Score:
    values = _values(records)
    mean = mean_of_groups([values])
    errors = {record.error for record in records if record.error}
    if errors - {OOM, UNFIT}:
        return _score(FAILED, None, len(values), planned)
    for status in (OOM, UNFIT):
        # a mean without the samples that failed would flatter the method
        if status in errors:
            return _score(status, None, len(values), planned)
    return _score(_completeness(len(values), planned), mean, len(values), planned)


def _combine(parts: Sequence[Score], mean: Mean | None) -> Score:
    fitting = [part for part in parts if part.status != UNFIT]
    n, planned = sum(part.n for part in fitting), sum(part.planned for part in fitting)
    if not fitting:
        return _score(UNFIT, None, 0, 0)
    for status in (FAILED, OOM):
        if any(part.status == status for part in fitting):
            return _score(status, None, n, planned)
    return _score(_completeness(n, planned), mean, n, planned)


def _average(rows: Sequence[Score]) -> Score:
    """Average over lengths; without one of them the number would not compare with others."""
    n, planned = sum(row.n for row in rows), sum(row.planned for row in rows)
    fitting = [row for row in rows if row.status != UNFIT]
    bad = [row.status for row in fitting if row.value is None]
    if bad or not fitting:
        return _score(bad[0] if bad else UNFIT, None, n, planned)
    value = sum(row.value or 0.0 for row in fitting) / len(fitting)
    errors = [row.error for row in fitting if row.error is not None]
    complete = len(errors) == len(fitting)
    error = sum(e * e for e in errors) ** 0.5 / len(fitting) if complete else None
    return Score(_completeness(n, planned), value, error, n, planned)


def _score(status: str, mean: Mean | None, n: int, planned: int) -> Score:
    if mean is None:
        return Score(status, None, None, n, planned)
    error = None if mean.error is None else 100 * mean.error
    return Score(status, 100 * mean.value, error, n, planned)


def _completeness(n: int, planned: int) -> str:
    return OK if n >= planned else PARTIAL if n else MISSING


def _values(records: Iterable[Record]) -> list[float]:
    return [record.score for record in records if record.score is not None]


def _differences(full: Sequence[Record], other: Sequence[Record]) -> list[float]:
    base = {record.index: record.score for record in full if record.score is not None}
    return [
        100 * (record.score - base[record.index])
        for record in other
        if record.score is not None and record.index in base
    ]


def _cost(records: Sequence[Record]) -> Cost:
    timings = [record.timings for record in records if record.timings]
    memory = [record.memory for record in records if record.memory]
    peaks = [use.peak_alloc_bytes for use in memory if use.peak_alloc_bytes is not None]
    per_token = [1e3 * times.tpot_s for times in timings if times.tpot_s is not None]
    return Cost(
        ttft_s=_mean([times.ttft_s for times in timings]),
        ms_per_token=_mean(per_token),
        peak_bytes=max(peaks, default=None),
        kv_bytes=_mean([use.kv_bytes for use in memory]),
        kv_ratio=_mean([use.kv_ratio for use in memory]),
        prompt_tokens=_mean([record.n_prompt_tokens for record in records]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _dict(paired: Paired | None) -> dict[str, Any] | None:
    return None if paired is None else asdict(paired)
