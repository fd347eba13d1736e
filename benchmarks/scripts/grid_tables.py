"""Reduce the answers of a grid to means and paired differences, and write them as tables."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from grid_jobs import FULL, RANDOM

from kvdock_bench.methods import MethodConfig
from kvdock_bench.record import UNFIT, Record
from kvdock_bench.statistics import Paired, mean_of_groups, paired_difference

Scores = dict[int, float]
Row = dict[str, Any]


class Grid:
    """Scores in percent by method id, length, task and sample."""

    def __init__(
        self,
        records: Iterable[Record],
        *,
        lengths: Sequence[int],
        tasks: Sequence[str],
        samples: int,
    ) -> None:
        self.lengths, self.tasks, self.samples = sorted(lengths), list(tasks), samples
        self._scores: dict[tuple[str, int, str], Scores] = defaultdict(dict)
        self._unfit: Counter[tuple[str, int]] = Counter()
        self._errors: Counter[tuple[str, int]] = Counter()
        for record in records:
            place = record.method_id, record.length
            if record.score is not None:
                self._scores[*place, record.task][record.index] = 100 * record.score
            elif record.error == UNFIT:
                self._unfit[place] += 1
            else:
                self._errors[place] += 1

    def at(self, method: str, length: int) -> Row:
        """Return the mean over tasks; complete tells whether every prompt that fits was scored."""
        groups = [list(self._scores[method, length, task].values()) for task in self.tasks]
        mean, n = mean_of_groups(groups), sum(map(len, groups))
        return {
            "mean": mean.value if mean else None,
            "error": mean.error if mean else None,
            "n": n,
            "failed": self._errors[method, length],
            "complete": n + self._unfit[method, length] == len(self.tasks) * self.samples,
            "tasks": {
                task: sum(group) / len(group)
                for task, group in zip(self.tasks, groups, strict=True)
                if group
            },
        }

    def difference(self, method: str, base: str, lengths: Sequence[int]) -> Row | None:
        """Return the mean difference on the prompts that both answered."""
        rows = [
            [
                [value - other[index] for index, value in scores.items() if index in other]
                for task in self.tasks
                for scores, other in [
                    (self._scores[method, length, task], self._scores[base, length, task])
                ]
            ]
            for length in lengths
        ]
        paired = paired_difference(rows)
        return None if paired is None else {**asdict(paired), "within_noise": _in_noise(paired)}

    def row(self, method: MethodConfig, bases: dict[str, str]) -> Row:
        """Return everything about one variant, compared with each base by method id."""
        own = method.method_id
        by_length = {length: self.at(own, length) for length in self.lengths}
        found = [cell for cell in by_length.values() if cell["mean"] is not None]
        every = len(found) == len(self.lengths)
        known = every and all(cell["error"] is not None for cell in found)
        return {
            "method": method.label,
            **method.identity,
            "lengths": {
                str(length): {**cell, **self._against(own, bases, [length])}
                for length, cell in by_length.items()
            },
            "mean": sum(c["mean"] for c in found) / len(found) if every else None,
            "error": math.sqrt(sum(c["error"] ** 2 for c in found)) / len(found) if known else None,
            "n": sum(cell["n"] for cell in found),
            "failed": sum(cell["failed"] for cell in by_length.values()),
            "complete": all(cell["complete"] for cell in by_length.values()),
            **self._against(own, bases, self.lengths),
        }

    def _against(self, method: str, bases: dict[str, str], lengths: Sequence[int]) -> Row:
        return {
            f"vs_{name}": self.difference(method, base, lengths)
            for name, base in bases.items()
            if base != method
        }


def summarise(grid: Grid, methods: Sequence[MethodConfig]) -> list[Row]:
    """Return a row per variant, compared with the full cache and with random at its budget."""
    full = dict([(FULL, m.method_id) for m in methods if m.is_full][:1])
    drawn: dict[str | None, str] = {}
    for method in methods:
        if method.ids == (RANDOM,):
            drawn.setdefault(method.budget, method.method_id)
    return [
        grid.row(m, full | ({RANDOM: drawn[m.budget]} if m.budget in drawn else {}))
        for m in methods
    ]


def to_markdown(rows: Sequence[Row], lengths: Sequence[int]) -> str:
    """Return one table per budget, methods without a budget first."""
    budgets = sorted(
        {row["budget"] for row in rows}, key=lambda text: (len(text or ""), text or "")
    )
    parts = [
        _table(budget, [r for r in rows if r["budget"] == budget], lengths) for budget in budgets
    ]
    return "\n".join([*parts, NOTE])


NOTE = """\
Percent, mean over tasks ± standard error; the mean weighs lengths equally. Differences are paired
on the same prompts, with a 95 % bootstrap interval over prompts (tasks and lengths are fixed).
`*`: answers are missing. `≈`: within noise, the interval contains 0.
"""


def _table(budget: str | None, rows: Sequence[Row], lengths: Sequence[int]) -> str:
    head = ["method", *map(str, sorted(lengths)), "mean", "n", "failed", "vs full", "vs random"]
    lines = [f"## {f'Budget {budget}' if budget else 'Without a budget'}", ""]
    lines += [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        cells = [_number(row["lengths"][str(length)]) for length in sorted(lengths)]
        numbers = [_number(row), str(row["n"]), str(row["failed"])]
        pairs = [_paired(row.get(f"vs_{name}")) for name in (FULL, RANDOM)]
        lines.append(_line([row["method"], *cells, *numbers, *pairs]))
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(cell: Row) -> str:
    if cell["mean"] is None:
        return "-"
    error = "" if cell["error"] is None else f" ± {cell['error']:.1f}"
    return f"{cell['mean']:.1f}{error}{'' if cell['complete'] else '*'}"


def _paired(pair: Row | None) -> str:
    if pair is None:
        return "-"
    text = f"{pair['difference']:+.1f} [{pair['low']:+.1f}, {pair['high']:+.1f}]"
    return f"{text} ≈" if pair["within_noise"] else text


def _in_noise(pair: Paired) -> bool:
    return pair.low <= 0 <= pair.high
