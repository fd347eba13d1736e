"""What a run will do: its cells in order, and the memory they will need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvdock import Budget
from kvdock_bench.fingerprint import short_hash
from kvdock_bench.methods import MethodConfig
from kvdock_bench.schema import BenchConfig
from kvdock_bench.shape import KVShape
from kvdock_bench.sources import TaskData
from kvdock_bench.tasks import Task

SCHEMA_VERSION = 1
PROTOCOL = "full-prompt"


@dataclass(frozen=True, slots=True)
class Cell:
    """All samples of one task at one length with one method."""

    method: MethodConfig
    length: int
    task: Task

    @property
    def name(self) -> str:
        """Return the cell's place in the run folder, without suffix."""
        return f"{self.method.method_id}/{self.task.name}_{self.length}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The config's samples for each method; methods share every prompt.

    Args:
        counts: samples of the tasks that have fewer than the config asks for.
    """

    config: BenchConfig
    methods: tuple[MethodConfig, ...]
    counts: Mapping[str, int] = field(default_factory=dict)

    def count(self, task: str) -> int:
        """Return the number of samples a cell of this task has."""
        return self.counts.get(task, self.config.num_samples)

    def groups(self) -> Iterator[tuple[int, Task, list[Cell]]]:
        """Yield the cells that share their prompts, from short to long."""
        for length in sorted(self.config.length):
            for task in self.config.tasks:
                yield length, task, [Cell(method, length, task) for method in self.methods]

    @property
    def cells(self) -> list[Cell]:
        """Return every cell in the order of the run."""
        return [cell for _, _, cells in self.groups() for cell in cells]

    @property
    def n_samples(self) -> int:
        """Return the number of answers to generate."""
        return sum(self.count(cell.task.name) for cell in self.cells)


def make_plan(config: BenchConfig, methods: Sequence[MethodConfig], data: TaskData) -> Plan:
    """Return the plan of a config, whose own files may hold fewer samples than it asks for."""
    sizes = {task.name: task.size(data) for task in config.tasks if hasattr(task, "size")}
    counts = {name: size for name, size in sizes.items() if size < config.num_samples}
    return Plan(config, tuple(methods), counts)


def run_identity(
    fingerprint: str, template: str, data: TaskData, tasks: list[Task]
) -> dict[str, Any]:
    """Return what all records of a run have in common."""
    return {
        "model": fingerprint,
        "template": template,
        "protocol": PROTOCOL,
        "data": {task.name: short_hash(data.describe([task])) for task in tasks},
    }


def generation_identity(config: BenchConfig, task: Task) -> dict[str, Any]:
    """Return the generation settings that decide a task's answers."""
    return {
        "max_new_tokens": config.max_new_tokens(task),
        "do_sample": config.generation.do_sample,
        "stop": list(config.generation.stop),
    }


def record_key(identity: dict[str, Any], cell: Cell, config: BenchConfig, index: int) -> str:
    """Return the name of one answer: equal exactly when it would be computed the same way.

    Args:
        identity: what the whole run has in common: model, template, protocol, and data by task.
    """
    raw = cell.task.name in config.no_template_tasks
    return short_hash(
        {
            "schema": SCHEMA_VERSION,
            **identity,
            "template": "raw" if raw else identity["template"],
            "answer_prefix": config.answer_prefix,
            "protocol": "context-first" if config.question == "agnostic" else PROTOCOL,
            "max_length": config.max_length,
            "data": identity["data"][cell.task.name],
            "method": cell.method.identity,
            "task": cell.task.name,
            "task_args": config.args_for(cell.task),
            "length": cell.length,
            "index": index,
            "seed": config.seed,
            "generation": generation_identity(config, cell.task),
        }
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """Estimated bytes of one prompt's cache; None where the method's kind gives no formula."""

    full: int
    compressed: dict[str, int | None]


def estimate_memory(plan: Plan, shape: KVShape, item_bytes: int, length: int) -> Memory:
    """Estimate the cache of one prompt of this length for every method."""
    full = shape.full_bytes(length, item_bytes)
    held: dict[str, int | None] = {}
    for method in plan.methods:
        budget = Budget.parse(method.budget)
        if method.is_full or budget is None or not shape.layers:
            held[method.label] = full if method.is_full else None
            continue
        slot = shape.slot_bytes(item_bytes)
        slots = min(budget.slots(length, slot_bytes=slot), length)
        held[method.label] = full - (length - slots) * slot
    return Memory(full, held)
