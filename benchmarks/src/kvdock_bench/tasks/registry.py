"""The list of tasks and groups, in the order of every table."""

from __future__ import annotations

from collections.abc import Iterable

from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.tasks.base import Task
from kvdock_bench.tasks.cwe import CommonWords
from kvdock_bench.tasks.fwe import FrequentWords
from kvdock_bench.tasks.niah import NIAH_TASKS
from kvdock_bench.tasks.qa import QA_TASKS
from kvdock_bench.tasks.vt import VariableTracking

_ALL: tuple[Task, ...] = (
    *NIAH_TASKS,
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
    *QA_TASKS,
)
TASKS = {task.name: task for task in _ALL}

GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(TASKS),
    # What the embedded 135M model can do: high, stable scores that hang on a few exact tokens.
    "light": (
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multivalue",
        "niah_multiquery",
    ),
    **{
        group: tuple(task.name for task in _ALL if task.group == group)
        for group in dict.fromkeys(task.group for task in _ALL)
    },
}


def get_task(name: str) -> Task:
    """Return the task of this name, or name the nearest ones."""
    if name not in TASKS:
        raise BenchError(f"Unknown task {name!r}.{did_you_mean(name, TASKS)}")
    return TASKS[name]


def get_tasks(names: str | Iterable[str]) -> list[Task]:
    """Return the tasks of task and group names, each once, in table order."""
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        if name in TASKS:
            chosen.add(name)
        elif name in GROUPS:
            chosen.update(GROUPS[name])
        else:
            raise BenchError(
                f"Unknown task or group {name!r}.{did_you_mean(name, [*TASKS, *GROUPS])}"
            )
    return [task for task in _ALL if task.name in chosen]
