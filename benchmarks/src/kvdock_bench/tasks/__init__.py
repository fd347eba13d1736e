"""The benchmarks' tasks: RULER's thirteen, further suites, and what an own suite is made of."""

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, Task
from kvdock_bench.tasks.registry import GROUPS, get_task, get_tasks
from kvdock_bench.tasks.suite import OWN_LENGTH, Suite
from kvdock_bench.tasks.suites import get_suite, suite_names

__all__ = [
    "GROUPS",
    "OWN_LENGTH",
    "Args",
    "Range",
    "Sample",
    "SampleKey",
    "Suite",
    "Task",
    "get_suite",
    "get_task",
    "get_tasks",
    "suite_names",
]
