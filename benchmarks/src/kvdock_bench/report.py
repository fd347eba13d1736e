"""Write a report's files: summary.json, CSV, table.md, plots, and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvdock_bench.atomic import write_json, write_text
from kvdock_bench.csv_files import csv_files
from kvdock_bench.errors import BenchError
from kvdock_bench.escaping import markdown
from kvdock_bench.folder import file_names
from kvdock_bench.page import Chapter, report_page
from kvdock_bench.runs import LoadedRun

REPORT = "report.html"
_ORIGIN = ("status", "command", "started", "ended", "versions", "git", "hardware", "model", "vllm")


def write_report(folder: Path, runs: Sequence[LoadedRun], chapters: Sequence[Chapter]) -> Path:
    """Write all results, each whole or not at all, and return the path of report.html."""
    summaries = [chapter.summary for chapter in chapters]
    boards = [chapter.summary.board.benchmark for chapter in chapters]
    starts = [f"{name}-" for name in file_names(boards)] if len(chapters) > 1 else [""]
    try:
        if (folder / "plots").is_symlink():
            raise BenchError(f"{folder / 'plots'} is a link, which no report makes. Remove it.")
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "summary.json",
            {
                "runs": {run.tag: _origin(run.info) for run in runs},
                "benchmarks": [summary.to_json() for summary in summaries],
            },
        )
        for name, text in csv_files(summaries).items():
            write_text(folder / name, text)
        write_text(folder / "table.md", to_markdown(chapters))
        for start, chapter in zip(starts, chapters, strict=True):
            for plot in chapter.plots:
                write_text(folder / "plots" / f"{start}{plot.name}.svg", plot.svg)
        write_text(folder / REPORT, report_page(chapters, runs))
    except OSError as error:
        raise BenchError(f"Cannot write into {folder} ({error.strerror or error}).") from error
    return folder / REPORT


def to_markdown(chapters: Sequence[Chapter]) -> str:
    """Return every table, the warnings above them."""
    parts = []
    for chapter in chapters:
        parts += [f"> {markdown(warning)}\n" for warning in chapter.warnings]
        parts += [table.to_markdown() for table in chapter.tables]
    return "\n".join(parts)


def _origin(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info.get(name) for name in _ORIGIN}
