"""Line up the methods of one or several runs as the columns of one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvdock_bench.methods import MethodConfig
from kvdock_bench.record import Record
from kvdock_bench.runs import LoadedRun

Cell = tuple[int, str]
"""A length and a task."""


@dataclass(slots=True)
class Column:
    """One method as measured; runs that measured different cells of it are one column.

    Args:
        key: unique in the table: the method's id, with the run's tag where two columns share it.
        base: the key of the full cache that it is compared with; None for a full cache itself.
        planned: samples by length and task; cells that no run planned are missing.
    """

    key: str
    label: str
    method: MethodConfig
    runs: list[LoadedRun]
    cells: dict[Cell, list[Record]] = field(default_factory=dict)
    planned: dict[Cell, int] = field(default_factory=dict)
    base: str | None = None

    @property
    def is_full(self) -> bool:
        """Tell whether this is a plain model with its full cache."""
        return self.method.is_full

    @property
    def budget(self) -> str | None:
        """Return the budget as written."""
        return self.method.budget


@dataclass(frozen=True, slots=True)
class Board:
    """The columns of one table, of one benchmark."""

    benchmark: str
    runs: tuple[LoadedRun, ...]
    columns: tuple[Column, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]

    def column(self, key: str) -> Column:
        """Return the column of this key."""
        return next(column for column in self.columns if column.key == key)


def make_boards(runs: Sequence[LoadedRun]) -> list[Board]:
    """Return one board per benchmark, in the order of the runs."""
    names = dict.fromkeys(run.benchmark for run in runs)
    return [make_board([run for run in runs if run.benchmark == name]) for name in names]


def make_board(runs: Sequence[LoadedRun]) -> Board:
    """Line up the methods of runs of one benchmark."""
    columns: list[Column] = []
    for run in runs:
        for name, method in run.methods.items():
            _add(columns, run, name, method)
    # the full caches first; they keep the order of their runs, as do the methods
    columns.sort(key=lambda column: not column.is_full)
    _label(columns)
    for column in columns:
        column.base = _base(columns, column)
    return Board(
        benchmark=runs[0].benchmark,
        runs=tuple(runs),
        columns=tuple(columns),
        lengths=tuple(sorted({length for run in runs for length in run.lengths})),
        tasks=tuple(dict.fromkeys(task for run in runs for task in run.tasks)),
    )


def _add(columns: list[Column], run: LoadedRun, name: str, method: MethodConfig) -> None:
    planned = {(n, task): count for n in run.lengths for task, count in run.planned.items()}
    for column in columns:
        same = column.key == name and column.runs[0].model == run.model
        if same and not planned.keys() & column.planned.keys():
            break
    else:
        column = Column(name, method.label, method, [])
        columns.append(column)
    column.runs.append(run)
    column.planned |= planned
    column.cells |= {place: run.cells[(name, *place)] for place in planned}


def _label(columns: list[Column]) -> None:
    """Tell columns apart: by model where models differ, then by what differs between namesakes."""
    if len({_model_name(column.runs[0]) for column in columns}) > 1:
        for column in columns:
            column.label += f", {_model_name(column.runs[0])}"
    keys = Counter(column.key for column in columns)
    for column in columns:
        if keys[column.key] > 1:
            column.key += f"@{column.runs[0].tag}"
    parts: tuple[Callable[[Column], str], ...] = (
        lambda column: column.budget or "",
        lambda column: column.runs[0].tag,
        lambda column: column.key,
    )
    for part in parts:
        namesakes: dict[str, list[Column]] = {}
        for column in columns:
            namesakes.setdefault(column.label, []).append(column)
        for group in namesakes.values():
            if len({part(column) for column in group}) > 1:
                for column in group:
                    column.label = f"{column.label} {part(column)}".rstrip()


def _model_name(run: LoadedRun) -> str:
    return f"{run.info['model']['name']} {run.info['model'].get('dtype', '')}".strip()


def _base(columns: Sequence[Column], column: Column) -> str | None:
    """Return the full cache of the column's own run, else another one of its model."""
    if column.is_full:
        return None
    full = [other for other in columns if other.is_full]
    own = [other for other in full if any(run in other.runs for run in column.runs)]
    alike = [other for other in full if other.runs[0].model == column.runs[0].model]
    return next((other.key for other in [*own, *alike]), None)
