"""Lay a summary's scores and differences out as tables."""

from __future__ import annotations

from kvdock_bench.columns import Column
from kvdock_bench.record import OOM, UNFIT
from kvdock_bench.scores import FAILED
from kvdock_bench.summary import ALL, Summary
from kvdock_bench.tables import NOISE, Table, clock, length_name, paired_text, score_text

OFFLINE = "offline"


def data_note(summary: Summary) -> str:
    """Say which tasks were made from offline substitutes; empty when none was."""
    marked = [task for task, text in summary.data_sources.items() if OFFLINE in text]
    if not marked:
        return ""
    name = summary.board.benchmark
    return (
        f"{name}-style, offline data: not comparable with published {name} numbers. "
        f"Substituted in {', '.join(marked)}."
    )


def main_table(summary: Summary) -> Table:
    """Return the headline's accuracy by length, the averages, and the time spent generating."""
    group, columns = summary.headline, summary.board.columns
    rows = _group_rows(summary, group)
    if group != ALL:
        name = f"All {len(summary.groups[ALL])} tasks"
        rows.append([name, *(_average_text(summary, column, ALL) for column in columns)])
    times = [summary.reasoning_s[column.key] for column in columns]
    if any(times):
        rows.append(["Reasoning time", *(clock(time) if time else "" for time in times)])
    offline = data_note(summary)
    name = summary.board.benchmark
    title = f"{name}-style accuracy (offline data)" if offline else f"{name} accuracy"
    if group != ALL:
        title += f", {group} tasks"
    notes = [_score_note(summary, group), _budget_note(summary), _legend(summary)]
    return Table(title, _head(summary), rows, " ".join(note for note in notes if note))


def accuracy_tables(summary: Summary) -> list[Table]:
    """Return the tables beside the main one: all tasks' means, and each task."""
    tables = []
    if summary.headline != ALL:
        title = f"Accuracy, all {len(summary.groups[ALL])} tasks"
        note = _score_note(summary, ALL)
        tables.append(Table(title, _head(summary), _group_rows(summary, ALL), note))
    return [*tables, _task_table(summary), _task_difference_table(summary)]


def _group_rows(summary: Summary, group: str) -> list[list[str]]:
    columns = summary.board.columns
    rows = []
    for length in summary.board.lengths:
        keys = [(column.key, length, group) for column in columns]
        planned = max(summary.scores[key].planned for key in keys)
        name = f"{length_name(length)} (n={planned})" if planned else length_name(length)
        rows.append([name, *(score_text(summary.scores[k], summary.paired[k]) for k in keys)])
    rows.append(["Average", *(_average_text(summary, column, group) for column in columns)])
    return rows


def _average_text(summary: Summary, column: Column, group: str) -> str:
    paired = summary.paired[column.key, None, group]
    return score_text(summary.averages[column.key, group], paired)


def difference_table(summary: Summary) -> Table:
    """Return the paired differences to the full cache, by group and length."""
    columns = [column for column in summary.board.columns if column.base]
    rows = []
    for group in summary.groups:
        for length in (*summary.board.lengths, None):
            name = "Average" if length is None else length_name(length)
            if len(summary.groups) > 1:
                name = f"{name}, {group}"
            pairs = [summary.paired[column.key, length, group] for column in columns]
            rows.append([name, *map(paired_text, pairs)])
    note = (
        "Points, on the same prompts; 95 % bootstrap interval, resampled within tasks. "
        f"{NOISE} within noise: the interval holds 0, or the sign-flip test gives p ≥ 0.05."
    )
    head = ["Length", *(column.label for column in columns)]
    return Table("Difference to the full cache", head, rows, note)


def _task_table(summary: Summary) -> Table:
    columns = summary.board.columns
    rows = [
        [
            f"{length_name(length)} {task}",
            *(
                score_text(
                    summary.task_scores[column.key, length, task],
                    summary.task_paired[column.key, length, task],
                )
                for column in columns
            ),
        ]
        for length in summary.board.lengths
        for task in summary.board.tasks
    ]
    return Table("Accuracy by task", ["Length, task", *_head(summary)[1:]], rows)


def _task_difference_table(summary: Summary) -> Table:
    columns = [column for column in summary.board.columns if column.base]
    rows = [
        [
            f"{length_name(length)} {task}",
            *(paired_text(summary.task_paired[c.key, length, task]) for c in columns),
        ]
        for length in summary.board.lengths
        for task in summary.board.tasks
    ]
    head = ["Length, task", *(column.label for column in columns)]
    return Table("Difference to the full cache by task", head, rows)


def _score_note(summary: Summary, group: str) -> str:
    tasks = summary.groups[group]
    count = f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    return (
        f"Percent, mean over {count} ± standard error; n answers per method and length. "
        f"{NOISE} within noise of the full cache on the same prompts."
    )


def _legend(summary: Summary) -> str:
    signs = {score.status for score in summary.task_scores.values()}
    meanings = {
        OOM: "- out of memory",
        UNFIT: "n/a: the task's smallest prompt is longer than this length",
        FAILED: "error: see errors.log",
    }
    legend = "; ".join(text for status, text in meanings.items() if status in signs)
    return f"{legend}." if legend else ""


def _budget_note(summary: Summary) -> str:
    """Name the budgets, unless the columns' labels do."""
    budgets = {c.label: c.budget for c in summary.board.columns if c.budget}
    if not budgets or all(budget in label for label, budget in budgets.items()):
        return ""
    if len(set(budgets.values())) == 1:
        return f"Budget {next(iter(budgets.values()))}."
    return "Budgets: " + ", ".join(f"{label} {budget}" for label, budget in budgets.items()) + "."


def _head(summary: Summary) -> list[str]:
    return ["Length", *(column.label for column in summary.board.columns)]
