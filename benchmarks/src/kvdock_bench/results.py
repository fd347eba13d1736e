"""Make the results of runs from their folders alone, at the end of a run or later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kvdock_bench.columns import make_boards
from kvdock_bench.config import make_config
from kvdock_bench.escaping import visible
from kvdock_bench.folder import RUN_FILE
from kvdock_bench.mixing import check_protocols
from kvdock_bench.page import Chapter, make_chapter
from kvdock_bench.record import Record
from kvdock_bench.report import write_report
from kvdock_bench.runs import LoadedRun, describe_run, load_run
from kvdock_bench.schema import BenchConfig
from kvdock_bench.summary import Summary, summarise
from kvdock_bench.tables import Table


def make_console() -> Console:
    """Return a console that does not squeeze tables into 80 columns where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


@dataclass(frozen=True, slots=True)
class Results:
    """What to show at the end: a main table and warnings per benchmark, and the report's path."""

    chapters: list[Chapter]
    path: Path

    def show(self, console: Console) -> None:
        """Print the tables and the report's path."""
        for chapter in self.chapters:
            show_table(console, chapter.main)
            for warning in chapter.warnings:
                console.print(Text(visible(warning)), soft_wrap=True)
        console.print(Text(visible(f"Report: {self.path}")), soft_wrap=True)


def show_table(console: Console, table: Table) -> None:
    """Print a table with its title and note."""
    grid = RichTable(box=box.SIMPLE_HEAD)
    for place, name in enumerate(table.head):
        grid.add_column(Text(visible(name)), justify="right" if place else "left")
    for row in table.rows:
        grid.add_row(*(Text(visible(cell)) for cell in row))
    console.print(Text(visible(table.title)), style="bold")
    console.print(grid)
    console.print(Text(visible(table.note)), soft_wrap=True)


def remake(folder: Path, *, allow_mixed: bool = False) -> Results:
    """Make the results of a run folder again from its records."""
    return make_report([load_run(folder)], folder, allow_mixed=allow_mixed)[0]


def make_results(
    folder: Path, info: dict[str, Any], records: Sequence[Record]
) -> tuple[Results, int]:
    """Write the report of a run that ends now, and count the cells that have errors."""
    run = describe_run(folder, info, records)
    # a resumed run has refused settings that differ, and an answer must never be lost for a table
    results, summaries = make_report([run], folder, allow_mixed=True)
    return results, sum(summary.failed for summary in summaries)


def make_report(
    runs: Sequence[LoadedRun], target: Path, *, allow_mixed: bool = False
) -> tuple[Results, list[Summary]]:
    """Write one report of some runs: summary, tables, plots and page.

    Raises:
        BenchError: the runs were asked in different ways and `allow_mixed` is not set.
    """
    boards = make_boards(runs)
    warnings = [check_protocols(board, allow_mixed=allow_mixed) for board in boards]
    summaries = [summarise(board) for board in boards]
    pairs = zip(summaries, warnings, strict=True)
    chapters = [make_chapter(summary, warning) for summary, warning in pairs]
    path = write_report(target, runs, chapters)
    return Results(chapters, path), summaries


def config_of(run: dict[str, Any]) -> BenchConfig:
    """Return the config that run.json holds."""
    return make_config(run["config"], RUN_FILE)
