"""Read finished or running runs for a report, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvdock_bench.errors import BenchError
from kvdock_bench.folder import RUN_FILE, read_run
from kvdock_bench.grid_records import is_grid, read_grid
from kvdock_bench.methods import MethodConfig
from kvdock_bench.record import Record
from kvdock_bench.records import RecordStore
from kvdock_bench.run_info import check_info

Place = tuple[str, int, str]
"""A cell of a table: method id, length, task."""


@dataclass(frozen=True)
class LoadedRun:
    """One run: its run.json, its plan as plain data, and the records that belong to the plan.

    Args:
        methods: by the id that the records hold.
        planned: samples per cell, by task.
    """

    tag: str
    info: dict[str, Any]
    methods: dict[str, MethodConfig]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    planned: dict[str, int]
    records: list[Record]

    @property
    def benchmark(self) -> str:
        """Return the benchmark's name."""
        return str(self.info["config"]["benchmark_name"])

    @property
    def model(self) -> str:
        """Return the fingerprint of the model, dtype included."""
        return str(self.info["model"]["fingerprint"])

    @cached_property
    def cells(self) -> dict[Place, list[Record]]:
        """Return the records by cell; a cell that has none is there too."""
        found: dict[Place, list[Record]] = {
            (method, length, task): []
            for method in self.methods
            for length in self.lengths
            for task in self.tasks
        }
        for record in self.records:
            found[record.method_id, record.length, record.task].append(record)
        return found


def load_run(folder: Path) -> LoadedRun:
    """Read a run's folder."""
    info = read_run(folder)
    if is_grid(folder):
        info, methods, records = read_grid(folder, info)
    else:
        store = RecordStore(folder)
        # a run may be appending at this moment, so a torn line is left alone
        store.load(repair=False)
        methods, records = None, list(store.by_key.values())
    return describe_run(folder, info, records, methods)


def describe_run(
    folder: Path,
    info: dict[str, Any],
    records: Sequence[Record],
    methods: dict[str, MethodConfig] | None = None,
) -> LoadedRun:
    """Return a run with those of the records that its run.json plans, the last of each place."""
    check_info(folder, info)
    config = info["config"]
    methods = methods or methods_of(info)
    if not methods:
        raise BenchError(f"{folder / RUN_FILE} names no method.")
    tasks, lengths = tuple(config["task_names"]), tuple(sorted(set(config["length"])))
    counts = info.get("counts", {})
    planned = {task: counts.get(task, config["num_samples"]) for task in tasks}
    latest = {
        (record.method_id, record.length, record.task, record.index): record
        for record in records
        if record.method_id in methods
        and record.length in lengths
        and record.task in tasks
        and record.index < planned[record.task]
    }
    kept = [latest[place] for place in sorted(latest)]
    return LoadedRun(folder.resolve().name, info, methods, tasks, lengths, planned, kept)


def methods_of(info: dict[str, Any]) -> dict[str, MethodConfig]:
    """Return the method configurations that run.json holds, by id."""
    return {
        entry["method_id"]: MethodConfig(
            label=entry["label"],
            ids=tuple(entry["methods"]),
            budget=entry["budget"],
            options=entry["options"],
            server=entry.get("server", "transformers"),
        )
        for entry in info["methods"]
    }
