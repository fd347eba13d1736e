"""What changed between two runs: a method's scores on the same prompts, before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvdock_bench.columns import Board, Column, make_board
from kvdock_bench.errors import BenchError
from kvdock_bench.record import OOM
from kvdock_bench.runs import LoadedRun
from kvdock_bench.scores import FAILED, MISSING, Score, compare
from kvdock_bench.statistics import LEVEL, Paired, false_discovery
from kvdock_bench.summary import Summary, summarise

WORSE, BETTER, NOISE, SAME = "worse", "better", "within noise", "same scores"
BROKEN, MENDED, APART = "fails now", "works now", "not compared"
AVERAGE, LENGTH, TASK = "average", "length", "task"


@dataclass(frozen=True, slots=True)
class Change:
    """One number before and after.

    Args:
        level: "average" over lengths and a group, "length" for a group at a length, or "task".
        what: the name of the group or the task.
        p: adjusted for the number of comparisons at the level; None without common prompts.
    """

    level: str
    label: str
    length: int | None
    what: str
    before: Score
    after: Score
    paired: Paired | None
    p: float | None
    verdict: str

    @property
    def is_regression(self) -> bool:
        """Tell whether it got worse beyond chance, or has stopped to work."""
        return self.verdict in (WORSE, BROKEN)


@dataclass(frozen=True, slots=True)
class Diff:
    """All comparisons of two runs of one benchmark.

    Args:
        pairs: the columns compared, before and after.
        unmatched: labels of methods that only one of the runs has, with its tag.
    """

    before: Summary
    after: Summary
    pairs: list[tuple[Column, Column]]
    unmatched: list[str]
    changes: list[Change]

    @property
    def regressions(self) -> list[Change]:
        """Return what got worse, the largest loss first."""
        return sorted((c for c in self.changes if c.is_regression), key=_loss)

    @property
    def improvements(self) -> list[Change]:
        """Return what got better, the largest gain first."""
        better = [c for c in self.changes if c.verdict in (BETTER, MENDED)]
        return sorted(better, key=_loss, reverse=True)


def compare_runs(first: LoadedRun, second: LoadedRun) -> Diff:
    """Compare the methods that two runs of a benchmark have in common.

    Raises:
        BenchError: the runs have no benchmark or no method in common.
    """
    if first.benchmark != second.benchmark:
        raise BenchError(
            f"--diff: {first.tag} is a run of {first.benchmark}, {second.tag} of "
            f"{second.benchmark}; expected two runs of one benchmark."
        )
    boards = make_board([first]), make_board([second])
    pairs = _pairs(*boards)
    if not pairs:
        raise BenchError(
            f"--diff: {first.tag} and {second.tag} have no method in common: "
            f"{_labels(boards[0])} against {_labels(boards[1])}."
        )
    matched = {column.key for pair in pairs for column in pair}
    unmatched = [
        f"{column.label} ({run.tag})"
        for run, board in zip((first, second), boards, strict=True)
        for column in board.columns
        if column.key not in matched
    ]
    before, after = summarise(boards[0]), summarise(boards[1])
    changes = list(_changes(before, after, pairs))
    if all(change.verdict == APART for change in changes):
        raise BenchError(
            f"--diff: {first.tag} and {second.tag} have no answered prompt in common. Seeds "
            f"{first.info['config']['seed']} and {second.info['config']['seed']}, lengths "
            f"{first.lengths} and {second.lengths}, tasks {first.tasks} and {second.tasks}."
        )
    adjusted = [c for level in (AVERAGE, LENGTH, TASK) for c in _judge(changes, level)]
    return Diff(before, after, pairs, unmatched, adjusted)


def _pairs(before: Board, after: Board) -> list[tuple[Column, Column]]:
    """Match columns by their configuration, else by methods and budget where that is clear."""
    later = {column.key: column for column in after.columns}
    pairs = [(column, later.pop(column.key)) for column in before.columns if column.key in later]
    left = [column for column in before.columns if column.key not in {a.key for a, _ in pairs}]
    for column in left:
        alike = [c for c in later.values() if _kind(c) == _kind(column)]
        if len(alike) == 1 and sum(_kind(c) == _kind(column) for c in left) == 1:
            pairs.append((column, later.pop(alike[0].key)))
    order = [column.key for column in before.columns]
    return sorted(pairs, key=lambda pair: order.index(pair[0].key))


def _kind(column: Column) -> tuple[tuple[str, ...], str | None, str]:
    return column.method.ids, column.budget, "" if column.method.ids else column.label


def _changes(
    before: Summary, after: Summary, pairs: Sequence[tuple[Column, Column]]
) -> Iterator[Change]:
    tasks = [task for task in before.board.tasks if task in after.board.tasks]
    lengths = [length for length in before.board.lengths if length in after.board.lengths]
    groups = [g for g, members in before.groups.items() if after.groups.get(g) == members]
    for old, new in pairs:
        cells = {
            (length, task): (old.cells.get((length, task), []), new.cells.get((length, task), []))
            for length in before.board.lengths
            for task in before.board.tasks
        }
        for group in groups:
            rows = [[cells[length, task] for task in before.groups[group]] for length in lengths]
            if before.board.lengths == after.board.lengths:
                scores = before.averages[old.key, group], after.averages[new.key, group]
                yield _change(AVERAGE, old, None, group, *scores, compare(rows))
            for length, row in zip(lengths, rows, strict=True):
                scores = before.scores[old.key, length, group], after.scores[new.key, length, group]
                yield _change(LENGTH, old, length, group, *scores, compare([row]))
        for length in lengths:
            for task in tasks:
                scores = (
                    before.task_scores[old.key, length, task],
                    after.task_scores[new.key, length, task],
                )
                yield _change(TASK, old, length, task, *scores, compare([[cells[length, task]]]))


def _change(
    level: str,
    column: Column,
    length: int | None,
    what: str,
    before: Score,
    after: Score,
    paired: Paired | None,
) -> Change:
    p = None if paired is None else paired.p
    verdict = APART if paired is None else NOISE
    bad = (OOM, FAILED)
    if before.status not in (*bad, MISSING) and after.status in bad:
        verdict, p = BROKEN, None
    elif before.status in bad and after.status not in (*bad, MISSING):
        verdict, p = MENDED, None
    elif before.value is None or after.value is None:
        verdict, p = APART, None
    return Change(level, column.label, length, what, before, after, paired, p, verdict)


def _judge(changes: Sequence[Change], level: str) -> list[Change]:
    """Adjust the p-values of a level for their number, and say what each means."""
    found = [change for change in changes if change.level == level]
    tested = [change.p for change in found if change.p is not None]
    adjusted = iter(false_discovery(tested))
    judged = []
    for change in found:
        if change.p is None or change.paired is None:
            judged.append(change)
            continue
        p, pair = next(adjusted), change.paired
        verdict = NOISE
        if pair.low == pair.difference == pair.high == 0:
            verdict = SAME
        elif p < LEVEL and not pair.within_noise:
            verdict = WORSE if pair.difference < 0 else BETTER
        judged.append(dataclasses.replace(change, p=p, verdict=verdict))
    return judged


def _loss(change: Change) -> float:
    if change.verdict in (BROKEN, MENDED) or change.paired is None:
        return -1000.0 if change.verdict == BROKEN else 1000.0
    return change.paired.difference


def _labels(board: Board) -> str:
    return ", ".join(column.label for column in board.columns)
