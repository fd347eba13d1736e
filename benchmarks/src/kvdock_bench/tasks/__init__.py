"""RULER's thirteen tasks, generated offline."""

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, Task
from kvdock_bench.tasks.registry import GROUPS, get_task, get_tasks

__all__ = ["GROUPS", "Args", "Range", "Sample", "SampleKey", "Task", "get_task", "get_tasks"]
