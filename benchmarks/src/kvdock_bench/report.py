"""Write a run's results: summary.json, summary.csv, table.md, plots, and report.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvdock_bench.atomic import write_json, write_text
from kvdock_bench.errors import BenchError
from kvdock_bench.plots import Plot, make_plots
from kvdock_bench.record import Record
from kvdock_bench.summary import Summary
from kvdock_bench.tables import Table, data_note, main_table, side_tables

REPORT = "report.html"
_EXAMPLES_PER_TASK = 2


def write_report(
    folder: Path, run: dict[str, Any], summary: Summary, records: list[Record]
) -> Path:
    """Write all results, each whole or not at all, and return the path of report.html."""
    main, sides = main_table(summary), side_tables(summary)
    plots = make_plots(summary)
    try:
        write_json(folder / "summary.json", {"run": _origin(run), **summary.to_json()})
        write_text(folder / "summary.csv", to_csv(summary))
        write_text(folder / "table.md", "\n".join(t.to_markdown() for t in (main, *sides)))
        (folder / "plots").mkdir(exist_ok=True)
        for plot in plots:
            write_text(folder / "plots" / f"{plot.name}.svg", plot.svg)
        html = to_html(run, summary, main, sides, plots, examples(summary, records))
        write_text(folder / REPORT, html)
    except OSError as error:
        raise BenchError(f"Cannot write into {folder} ({error.strerror or error}).") from error
    return folder / REPORT


def to_csv(summary: Summary) -> str:
    """Return one line per method, length and task."""
    text = io.StringIO()
    names = "method_id method budget length task status score standard_error n planned data_source"
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(names.split())
    for method in summary.methods:
        for length in summary.lengths:
            for task in summary.tasks:
                score = summary.task_scores[method.method_id, length, task]
                lines.writerow(
                    [
                        method.method_id,
                        method.label,
                        method.budget or "",
                        length,
                        task,
                        score.status,
                        "" if score.value is None else f"{score.value:.4f}",
                        "" if score.error is None else f"{score.error:.4f}",
                        score.n,
                        score.planned,
                        summary.data_sources.get(task, ""),
                    ]
                )
    return text.getvalue()


def examples(summary: Summary, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return a few samples per task, those on which methods disagree first."""
    grouped: dict[tuple[int, str, int], dict[str, Record]] = {}
    for record in records:
        place = (record.length, record.task, record.index)
        grouped.setdefault(place, {})[record.method_id] = record
    chosen = []
    for task in summary.tasks:
        samples = [(place, found) for place, found in grouped.items() if place[1] == task]
        samples.sort(key=lambda sample: (-_disagreement(sample[1].values()), sample[0]))
        for (length, _, index), found in samples[:_EXAMPLES_PER_TASK]:
            answers = [
                (method.label, found[method.method_id])
                for method in summary.methods
                if method.method_id in found
            ]
            references = answers[0][1].references
            chosen.append(
                {
                    "task": task,
                    "length": length,
                    "index": index,
                    "references": references,
                    "answers": answers,
                }
            )
    return chosen


def to_html(
    run: dict[str, Any],
    summary: Summary,
    main: Table,
    sides: Sequence[Table],
    plots: Sequence[Plot],
    samples: list[dict[str, Any]],
) -> str:
    """Return a page that needs nothing outside itself; everything but the drawings is escaped."""
    source = (resources.files("kvdock_bench") / "templates" / "report.html.j2").read_text("utf-8")
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source)
    return page.render(
        run=run,
        facts=_facts(run),
        main=main,
        sides=sides,
        warning=data_note(summary),
        # matplotlib escapes the labels it draws
        plots=[(plot.title, Markup(plot.svg), plot.note) for plot in plots],
        samples=samples,
    )


def _disagreement(records: Iterable[Record]) -> float:
    scores = [record.score for record in records if record.score is not None]
    return max(scores) - min(scores) if scores else 0.0


def _origin(run: dict[str, Any]) -> dict[str, Any]:
    names = ("status", "command", "started", "ended", "versions", "git", "hardware", "model")
    return {name: run.get(name) for name in names}


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader must know to judge the numbers."""
    versions, hardware, model = run["versions"], run["hardware"], run["model"]
    git = run.get("git") or {}
    dirty = " with local changes" if git.get("dirty") else ""
    facts = [
        ("Model", f"{model['name']} ({model['dtype']}, attention {model['attention']})"),
        ("Fingerprint", model["fingerprint"]),
        ("Device", f"{hardware['device']}, {hardware['cores']} cores"),
        ("Software", ", ".join(f"{name} {text}" for name, text in versions.items() if text)),
        ("Commit", f"{git['sha']}{dirty}" if git else ""),
        ("Command", run["command"]),
        ("Seed", str(run["config"]["seed"])),
        ("Template", f"{run['identity']['template']}, prefix {run['config']['answer_prefix']}"),
        ("Started", run["started"]),
        ("Ended", run.get("ended") or ""),
        ("Status", run["status"]),
    ]
    return [(name, text) for name, text in facts if text]
