"""Fill the pages' templates: everything but our own drawings is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvdock_bench.accuracy_tables import (
    accuracy_tables,
    data_note,
    difference_table,
    main_table,
)
from kvdock_bench.cost_tables import cost_tables
from kvdock_bench.escaping import visible
from kvdock_bench.examples import Example, examples
from kvdock_bench.heatmaps import HeatMap, depth_heatmap, task_heatmaps
from kvdock_bench.plots import Plot, make_plots
from kvdock_bench.runs import LoadedRun
from kvdock_bench.summary import Summary
from kvdock_bench.tables import Table


@dataclass(frozen=True, slots=True)
class Chapter:
    """What a page shows of one benchmark."""

    summary: Summary
    main: Table
    differences: Table | None
    sides: list[Table]
    plots: list[Plot]
    tasks: list[HeatMap]
    depths: list[HeatMap]
    samples: list[Example]
    warnings: list[str] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        """Return every table, the main one first."""
        return [t for t in (self.main, self.differences, *self.sides) if t is not None]


def make_chapter(summary: Summary, mixed: str = "") -> Chapter:
    """Lay a summary out.

    Args:
        mixed: the warning about mixed protocols, empty for none.
    """
    sides = [*accuracy_tables(summary), *cost_tables(summary)]
    differences = difference_table(summary)
    warnings = [mixed, data_note(summary)]
    return Chapter(
        summary=summary,
        main=main_table(summary).fitted(),
        differences=None if differences.is_empty else differences.fitted(),
        sides=[table.fitted() for table in sides if not table.is_empty],
        plots=make_plots(summary),
        tasks=task_heatmaps(summary),
        depths=[depth_heatmap(found) for found in summary.depths],
        samples=examples(summary.board),
        warnings=[text for text in warnings if text],
    )


def report_page(chapters: Sequence[Chapter], runs: Sequence[LoadedRun]) -> str:
    """Return a page that needs nothing outside itself."""
    models = " and ".join(dict.fromkeys(run.info["model"]["name"] for run in runs))
    benchmarks = " and ".join(dict.fromkeys(run.benchmark for run in runs))
    return _render(
        "report.html.j2",
        title=f"{models} on {benchmarks}",
        chapters=chapters,
        unfinished=[(r.tag, r.info["status"]) for r in runs if r.info["status"] != "finished"],
        runs=[(run.tag, facts_of(run.info)) for run in runs],
    )


def diff_page(title: str, lead: str, warnings: list[str], tables: Sequence[Table]) -> str:
    """Return the page of a comparison of two runs."""
    return _render("diff.html.j2", title=title, lead=lead, warnings=warnings, tables=tables)


def facts_of(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader must know to judge a run's numbers."""
    versions, hardware, model = info["versions"], info["hardware"], info["model"]
    vllm = (info.get("vllm") or {}).get("versions", {})
    git = info.get("git") or {}
    dirty = " with local changes" if git.get("dirty") else ""
    attention = model.get("attention") or "not recorded"
    facts = [
        ("Model", f"{model['name']} ({model.get('dtype')}, attention {attention})"),
        ("Fingerprint", model["fingerprint"]),
        ("Device", f"{hardware['device']}, {hardware.get('cores')} cores"),
        ("Software", ", ".join(f"{name} {text}" for name, text in versions.items() if text)),
        ("vLLM", ", ".join(f"{name} {text}" for name, text in vllm.items())),
        ("Commit", f"{git['sha']}{dirty}" if git else ""),
        ("Command", info["command"]),
        ("Seed", str(info["config"]["seed"])),
        ("Template", f"{info['identity']['template']}, prefix {info['config']['answer_prefix']}"),
        ("Started", info["started"]),
        ("Ended", info.get("ended") or ""),
        ("Status", info["status"]),
    ]
    return [(name, text) for name, text in facts if text]


def _seen(value: Any) -> Any:
    """Make what cannot be seen visible, but for drawings, which are markup of our own."""
    return visible(value) if type(value) is str else value


def _render(name: str, **content: Any) -> str:
    pages = Environment(
        loader=PackageLoader("kvdock_bench"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # our labels in a drawing are escaped by what draws it
    pages.filters["drawing"] = lambda plot: Markup(plot.svg)
    return pages.get_template(name).render(**content)
