"""RULER's tasks and groups, in the order of every table."""

from __future__ import annotations

from collections.abc import Iterable

from kvdock_bench.tasks.base import Task
from kvdock_bench.tasks.cwe import CommonWords
from kvdock_bench.tasks.fwe import FrequentWords
from kvdock_bench.tasks.niah import NIAH_TASKS
from kvdock_bench.tasks.qa import QA_TASKS
from kvdock_bench.tasks.suite import Suite
from kvdock_bench.tasks.vt import VariableTracking

_ALL: tuple[Task, ...] = (
    *NIAH_TASKS,
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
    *QA_TASKS,
)

GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(task.name for task in _ALL),
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


RULER = Suite("RULER", _ALL, GROUPS, default="light")


def get_task(name: str) -> Task:
    """Return RULER's task of this name, or name the nearest ones."""
    return RULER.task(name)


def get_tasks(names: str | Iterable[str]) -> list[Task]:
    """Return RULER's tasks of task and group names, each once, in table order."""
    return RULER.select(names)
