"""One number of a table and why there may be none: reduce the records of a cell, or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvdock_bench.record import OOM, UNFIT, Record
from kvdock_bench.statistics import Mean, Paired, mean_of_groups, paired_difference

OK, PARTIAL, MISSING, FAILED = "ok", "partial", "missing", "failed"


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy in percent; status tells a number from "oom", "does not fit" and "failed".

    Args:
        lacking: tasks of a mean that have no answer yet; such a mean compares with no other.
    """

    status: str
    value: float | None
    error: float | None
    n: int
    planned: int
    lacking: int = 0

    @property
    def comparable(self) -> float | None:
        """Return the value unless whole tasks are missing from it."""
        return None if self.lacking else self.value


def task_score(records: Sequence[Record], planned: int) -> Score:
    """Return the mean of one task's answers, or the status of what went wrong."""
    values = values_of(records)
    errors = {record.error for record in records if record.error}
    if errors - {OOM, UNFIT}:
        return _score(FAILED, None, len(values), planned)
    for status in (OOM, UNFIT):
        # a mean without the samples that failed would flatter the method
        if status in errors:
            return _score(status, None, len(values), planned)
    mean = mean_of_groups([values])
    return _score(_completeness(len(values), planned), mean, len(values), planned)


def combine(parts: Sequence[Score], cells: Sequence[Sequence[Record]]) -> Score:
    """Return the mean over tasks; those whose smallest prompt does not fit are left out."""
    fitting = [part for part in parts if part.status != UNFIT]
    n, planned = sum(part.n for part in fitting), sum(part.planned for part in fitting)
    if not fitting:
        return _score(UNFIT if parts else MISSING, None, 0, 0)
    for status in (FAILED, OOM):
        if any(part.status == status for part in fitting):
            return _score(status, None, n, planned)
    mean = mean_of_groups([values_of(cell) for cell in cells])
    lacking = sum(part.value is None for part in fitting) if n else 0
    return _score(_completeness(n, planned), mean, n, planned, lacking)


def average(rows: Sequence[Score]) -> Score:
    """Average over lengths; without one of them the number would not compare with others."""
    n, planned = sum(row.n for row in rows), sum(row.planned for row in rows)
    fitting = [row for row in rows if row.status != UNFIT]
    bad = [MISSING if row.lacking else row.status for row in fitting if row.comparable is None]
    if bad or not fitting:
        return _score(bad[0] if bad else UNFIT, None, n, planned)
    value = sum(row.value or 0.0 for row in fitting) / len(fitting)
    errors = [row.error for row in fitting if row.error is not None]
    complete = len(errors) == len(fitting)
    error = sum(e * e for e in errors) ** 0.5 / len(fitting) if complete else None
    return Score(_completeness(n, planned), value, error, n, planned)


def compare(
    rows: Sequence[Sequence[tuple[Sequence[Record], Sequence[Record]]]],
) -> Paired | None:
    """Return the paired difference in points over rows (lengths) of pairs of cells (tasks).

    Args:
        rows: of each cell the records before, or of the full cache, and those compared with them.
    """
    return paired_difference([[_differences(*pair) for pair in row] for row in rows])


def values_of(records: Iterable[Record]) -> list[float]:
    """Return the scores of the answered samples."""
    return [record.score for record in records if record.score is not None]


def _differences(before: Sequence[Record], after: Sequence[Record]) -> list[float]:
    base = {_prompt(record): record.score for record in before if record.score is not None}
    return [
        100 * (record.score - base[_prompt(record)])
        for record in after
        if record.score is not None and _prompt(record) in base
    ]


def _prompt(record: Record) -> tuple[int, str]:
    # the same place in another run may hold another prompt
    return record.index, record.prompt_sha


def _score(status: str, mean: Mean | None, n: int, planned: int, lacking: int = 0) -> Score:
    if mean is None:
        return Score(status, None, None, n, planned, lacking)
    error = None if mean.error is None else 100 * mean.error
    return Score(status, 100 * mean.value, error, n, planned, lacking)


def _completeness(n: int, planned: int) -> str:
    return OK if n >= planned > 0 else PARTIAL if n else MISSING
