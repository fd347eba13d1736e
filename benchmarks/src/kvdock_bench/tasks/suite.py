"""A suite: tasks that are run, scored and averaged together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.tasks.base import Task

OWN_LENGTH = 0
"""The length of prompts that are not fitted to one."""


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks in table order, and names for some of them together.

    Args:
        fitted: whether prompts grow to the lengths of a config; else they have their own.
        default: the task or group that a config without `task_names` means.
        no_template: tasks that get no chat template unless a config says otherwise.
        lengths: of a config that names none, in tokens.
        cut_first: whether max_length cuts the middle before the chat template is put around.
    """

    name: str
    tasks: tuple[Task, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fitted: bool = True
    default: str = "all"
    no_template: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    cut_first: bool = False

    def __post_init__(self) -> None:
        """Fill in the lengths."""
        if not self.lengths:
            usual = (512, 1024, 2048) if self.fitted else (OWN_LENGTH,)
            object.__setattr__(self, "lengths", usual)

    def task(self, name: str) -> Task:
        """Return the task of this name, or name the nearest ones."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise BenchError(f"Unknown task {name!r}.{did_you_mean(name, self._names)}")

    def select(self, names: str | Iterable[str]) -> list[Task]:
        """Return the tasks of task and group names, each once, in table order."""
        groups = {"all": self._names, **self.groups}
        chosen: set[str] = set()
        for name in [names] if isinstance(names, str) else names:
            if name in self._names:
                chosen.add(name)
            elif name in groups:
                chosen.update(groups[name])
            else:
                hint = did_you_mean(name, [*self._names, *groups])
                raise BenchError(f"Unknown task or group {name!r}.{hint}")
        return [task for task in self.tasks if task.name in chosen]

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)
