"""Write what changed between two runs as tables: terminal, Markdown, CSV, and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from kvdock_bench.atomic import write_text
from kvdock_bench.diff import AVERAGE, LENGTH, Change, Diff
from kvdock_bench.errors import BenchError
from kvdock_bench.escaping import markdown, spreadsheet
from kvdock_bench.page import diff_page, facts_of
from kvdock_bench.summary import Cost
from kvdock_bench.tables import Table, length_name, score_text, size

DIFF_PAGE = "diff.html"
_HEAD = ["Method", "Verdict", "Length", "Of", "Difference [95 %]", "Before", "After", "p"]


def diff_lead(found: Diff) -> str:
    """Say in a sentence how the comparison went."""
    worse, better = len(found.regressions), len(found.improvements)
    return (
        f"{worse or 'No'} significant {'regression' if worse == 1 else 'regressions'} and "
        f"{better or 'no'} {'improvement' if better == 1 else 'improvements'} among "
        f"{len(found.changes)} comparisons."
    )


def diff_warnings(found: Diff) -> list[str]:
    """Say what the two runs differ in, beside their answers."""
    before, after = found.before.board.runs[0].info, found.after.board.runs[0].info
    old, new = dict(facts_of(before)), dict(facts_of(after))
    names = ("Model", "Fingerprint", "Device", "Software", "Commit")
    texts = [
        f"{name}: {old.get(name, 'not recorded')} before, {new.get(name, 'not recorded')} after."
        for name in names
        if old.get(name) != new.get(name)
    ]
    texts += [
        f"{a.label}: options {a.method.identity['options']} before, "
        f"{b.method.identity['options']} after."
        for a, b in found.pairs
        if a.method.identity != b.method.identity
    ]
    if found.unmatched:
        texts.append(f"Only in one run: {', '.join(found.unmatched)}.")
    return texts


def diff_tables(found: Diff) -> list[Table]:
    """Return the tables: averages, regressions, improvements, lengths, and costs."""
    averages = [change for change in found.changes if change.level == AVERAGE]
    lengths = [change for change in found.changes if change.level == LENGTH]
    note = (
        "Percent and points on the same prompts; p of the sign-flip test, adjusted after Benjamini "
        "and Hochberg for the comparisons of its level (averages, lengths, tasks). A verdict needs "
        "p < 0.05 and an interval without 0."
    )
    tables = [
        _table("Averages", averages, note),
        _table("Regressions", found.regressions),
        _table("Improvements", found.improvements),
        _table("By length", lengths),
        _cost_table(found),
    ]
    return [table for table in tables if table.rows]


def write_diff(folder: Path, found: Diff, warnings: Sequence[str]) -> Path:
    """Write diff.md, diff.csv and diff.html, each whole or not at all; return the page's path."""
    before, after = (s.board.runs[0].tag for s in (found.before, found.after))
    title, tables = f"{after} against {before}", diff_tables(found)
    texts = [f"# {markdown(title)}\n", f"{diff_lead(found)}\n"]
    texts += [f"> {markdown(text)}\n" for text in warnings]
    texts += [table.to_markdown() for table in tables]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "diff.md", "\n".join(texts))
        write_text(folder / "diff.csv", _csv(found))
        page = diff_page(title, diff_lead(found), list(warnings), tables)
        write_text(folder / DIFF_PAGE, page)
    except OSError as error:
        raise BenchError(f"Cannot write into {folder} ({error.strerror or error}).") from error
    return folder / DIFF_PAGE


def _table(title: str, changes: Sequence[Change], note: str = "") -> Table:
    rows = [
        [
            change.label,
            change.verdict,
            "all" if change.length is None else length_name(change.length),
            change.what,
            _difference(change),
            score_text(change.before),
            score_text(change.after),
            _p(change.p),
        ]
        for change in changes
    ]
    return Table(title, _HEAD, rows, note)


def _cost_table(found: Diff) -> Table:
    measures: dict[str, tuple[Callable[[Cost], float | None], Callable[[float], str]]] = {
        "TTFT (s)": (lambda cost: cost.ttft_s, "{:.3f}".format),
        "ms per token": (lambda cost: cost.ms_per_token, "{:.1f}".format),
        "KV bytes": (lambda cost: cost.kv_bytes, size),
        "Peak bytes": (lambda cost: cost.peak_bytes, size),
    }
    rows = []
    lengths = [n for n in found.before.board.lengths if n in found.after.board.lengths]
    for old, new in found.pairs:
        for length in lengths:
            costs = found.before.costs[old.key, length], found.after.costs[new.key, length]
            row = [old.label, length_name(length)]
            for value, text in measures.values():
                before, after = map(value, costs)
                if before and after is not None:
                    row.append(f"{text(before)} → {text(after)} ({after / before - 1:+.0%})")
                else:
                    row.append("")
            if any(row[2:]):
                rows.append(row)
    note = "Means before → after. Times are not judged: they hang on the machine and its load."
    return Table("Time and memory", ["Method", "Length", *measures], rows, note)


def _difference(change: Change) -> str:
    pair = change.paired
    if pair is None:
        return ""
    return f"{pair.difference:+.2f} [{pair.low:+.1f}, {pair.high:+.1f}]"


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _csv(found: Diff) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    names = "level method length of before after difference low high n p_adjusted verdict"
    lines.writerow(names.split())
    for change in found.changes:
        pair = change.paired
        lines.writerow(
            [
                *(change.level, spreadsheet(change.label)),
                *(change.length or "all", spreadsheet(change.what)),
                *(_plain(score.value, score.status) for score in (change.before, change.after)),
                *(
                    ["", "", "", 0]
                    if pair is None
                    else [*map(_plain, (pair.difference, pair.low, pair.high)), pair.n]
                ),
                "" if change.p is None else f"{change.p:.3g}",
                change.verdict,
            ]
        )
    return text.getvalue()


def _plain(value: float | None, status: str = "") -> str:
    return status if value is None else f"{value:.4f}"
