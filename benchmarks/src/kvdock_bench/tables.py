"""Lay the summary out as tables, once for Markdown, HTML and the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvdock_bench.record import OOM, UNFIT
from kvdock_bench.summary import FAILED, PARTIAL, Score, Summary
from kvdock_bench.tasks import OWN_LENGTH

OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class Table:
    """A titled grid of texts; the first column names the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def to_markdown(self) -> str:
        """Return a heading, a pipe table and the note."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        grid = "\n".join("| " + " | ".join(_escape(c) for c in line) + " |" for line in lines)
        return f"## {self.title}\n\n{grid}\n" + (f"\n{self.note}\n" if self.note else "")


def clock(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size(count: float | None) -> str:
    """Return bytes with a binary unit."""
    if count is None:
        return ""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.4g} {units[0]}"


def length_name(length: int) -> str:
    """Return 4K for 4096, 500 for 500, and "own" for prompts that are not fitted."""
    if length == OWN_LENGTH:
        return "own"
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def score_text(score: Score) -> str:
    """Return a number with its standard error, or the sign of why there is none."""
    if score.value is None:
        return {OOM: "-", UNFIT: "n/a", FAILED: "error"}.get(score.status, "")
    error = "" if score.error is None else f" ±{score.error:.1f}"
    part = f" (n={score.n})" if score.status == PARTIAL else ""
    return f"{score.value:.2f}{error}{part}"


def data_note(summary: Summary) -> str:
    """Say which tasks were made from offline substitutes; empty when none was."""
    marked = [task for task, text in summary.data_sources.items() if OFFLINE in text]
    if not marked:
        return ""
    return (
        "RULER-style, offline data: not comparable with published RULER numbers. "
        f"Substituted in {', '.join(marked)}."
    )


def main_table(summary: Summary) -> Table:
    """Return accuracy by length, the average, and the time spent generating."""
    rows = []
    for length in summary.lengths:
        scores = [summary.scores[m.method_id, length] for m in summary.methods]
        planned = max(score.planned for score in scores)
        name = f"{length_name(length)} (n={planned})" if planned else length_name(length)
        rows.append([name, *map(score_text, scores)])
    averages = [summary.averages[m.method_id] for m in summary.methods]
    rows.append(["Average", *map(score_text, averages)])
    times = [clock(summary.reasoning_s[m.method_id]) for m in summary.methods]
    rows.append(["Reasoning time", *times])
    signs = {score.status for score in summary.task_scores.values()}
    meanings = {
        OOM: "- out of memory",
        UNFIT: "n/a: the task's smallest prompt is longer than this length",
        FAILED: "error: see errors.log",
    }
    legend = "; ".join(text for status, text in meanings.items() if status in signs)
    parts = [
        "Percent, mean over tasks ± standard error; n answers per method and length.",
        _budget_note(summary),
        f"{legend}." if legend else "",
        data_note(summary),
    ]
    title = "RULER-style accuracy (offline data)" if data_note(summary) else "RULER accuracy"
    return Table(title, _head(summary), rows, " ".join(part for part in parts if part))


def _budget_note(summary: Summary) -> str:
    """Name the budgets, unless the columns' labels do."""
    budgets = {m.label: m.budget for m in summary.methods if m.budget}
    if not budgets or all(budget in label for label, budget in budgets.items()):
        return ""
    if len(set(budgets.values())) == 1:
        return f"Budget {next(iter(budgets.values()))}."
    return "Budgets: " + ", ".join(f"{label} {budget}" for label, budget in budgets.items()) + "."


def side_tables(summary: Summary) -> list[Table]:
    """Return the tables beside the main one; those without any number are left out."""
    tables = [
        _difference_table(summary),
        _task_table(summary),
        _cost_table(summary, "Time to first token (s)", lambda c: _number(c.ttft_s, "{:.3f}")),
        _cost_table(summary, "Time per token (ms)", lambda c: _number(c.ms_per_token, "{:.1f}")),
        _cost_table(summary, "Peak memory allocated on the device", lambda c: size(c.peak_bytes)),
        _cost_table(summary, "KV cache held after prefill, per prompt", lambda c: size(c.kv_bytes)),
        _cost_table(
            summary, "KV cache held, share of full", lambda c: _number(c.kv_ratio, "{:.1%}")
        ),
        _cost_table(
            summary, "Prompt length (tokens, mean)", lambda c: _number(c.prompt_tokens, "{:.0f}")
        ),
    ]
    return [table for table in tables if any(any(row[1:]) for row in table.rows)]


def _difference_table(summary: Summary) -> Table:
    methods = summary.methods[1:]
    rows = []
    for length in (*summary.lengths, None):
        row = ["Average" if length is None else length_name(length)]
        for method in methods:
            pair = summary.paired.get((method.method_id, length))
            row.append(
                f"{pair.difference:+.2f} [{pair.low:+.1f}, {pair.high:+.1f}]" if pair else ""
            )
        rows.append(row)
    note = "Points, on the same prompts; 95 % bootstrap interval, resampled within tasks."
    head = ["Length", *(method.label for method in methods)]
    return Table("Difference to the full cache", head, rows, note)


def _task_table(summary: Summary) -> Table:
    rows = [
        [
            f"{length_name(length)} {task}",
            *(score_text(summary.task_scores[m.method_id, length, task]) for m in summary.methods),
        ]
        for length in summary.lengths
        for task in summary.tasks
    ]
    return Table("Accuracy by task", ["Length, task", *_head(summary)[1:]], rows)


def _cost_table(summary: Summary, title: str, cell: Callable[..., str]) -> Table:
    rows = [
        [
            length_name(length),
            *(cell(summary.costs[m.method_id, length]) for m in summary.methods),
        ]
        for length in summary.lengths
    ]
    return Table(title, _head(summary), rows)


def _head(summary: Summary) -> list[str]:
    return ["Length", *(method.label for method in summary.methods)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
