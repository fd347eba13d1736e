"""Make a run's results from its folder alone, at the end of a run or later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kvdock_bench.config import make_config
from kvdock_bench.errors import BenchError
from kvdock_bench.folder import RUN_FILE
from kvdock_bench.methods import MethodConfig
from kvdock_bench.plan import Plan, record_key
from kvdock_bench.record import Record
from kvdock_bench.records import RecordStore
from kvdock_bench.report import write_report
from kvdock_bench.schema import BenchConfig
from kvdock_bench.summary import Summary, summarise
from kvdock_bench.tables import Table, main_table


def make_console() -> Console:
    """Return a console that does not squeeze tables into 80 columns where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


@dataclass(frozen=True, slots=True)
class Results:
    """The main table and where the report lies."""

    table: Table
    path: Path

    def show(self, console: Console) -> None:
        """Print the table and the report's path."""
        grid = RichTable(box=box.SIMPLE_HEAD)
        for place, name in enumerate(self.table.head):
            grid.add_column(Text(name), justify="right" if place else "left")
        for row in self.table.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(Text(self.table.title), style="bold")
        console.print(grid)
        console.print(Text(self.table.note), soft_wrap=True)
        console.print(Text(f"Report: {self.path}"), soft_wrap=True)


def remake(folder: Path, run: dict[str, Any]) -> Results:
    """Make the results of a run folder again from its records."""
    store = RecordStore(folder)
    # a run may be appending at this moment, so a torn line is left alone
    store.load(repair=False)
    return make_results(folder, run, store)[0]


def make_results(folder: Path, run: dict[str, Any], store: RecordStore) -> tuple[Results, Summary]:
    """Write summary, tables, plots and report for the records that belong to the run's plan."""
    plan = plan_of(run, folder)
    records = planned_records(plan, run["identity"], store)
    summary = summarise(plan, records)
    path = write_report(folder, run, summary, records)
    return Results(main_table(summary), path), summary


def planned_records(plan: Plan, identity: dict[str, Any], store: RecordStore) -> list[Record]:
    """Return the records of the plan's answers, in its order."""
    keys = (
        record_key(identity, cell, plan.config, index)
        for cell in plan.cells
        for index in range(plan.count(cell.task.name))
    )
    return [store.by_key[key] for key in keys if key in store.by_key]


def plan_of(run: dict[str, Any], folder: Path) -> Plan:
    """Return the plan that run.json describes."""
    try:
        return Plan(config_of(run), tuple(methods_of(run)), run.get("counts", {}))
    except (KeyError, TypeError) as error:
        raise BenchError(
            f"{folder / RUN_FILE} does not describe a run of this version ({error!r})."
        ) from error


def config_of(run: dict[str, Any]) -> BenchConfig:
    """Return the config that run.json holds."""
    return make_config(run["config"], RUN_FILE)


def methods_of(run: dict[str, Any]) -> list[MethodConfig]:
    """Return the method configurations that run.json holds."""
    return [
        MethodConfig(
            label=entry["label"],
            ids=tuple(entry["methods"]),
            budget=entry["budget"],
            options=entry["options"],
        )
        for entry in run["methods"]
    ]
