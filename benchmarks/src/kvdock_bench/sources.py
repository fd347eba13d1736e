"""The texts of one run, loaded when first needed and described for its record."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvdock_bench.haystack import Haystack, load_haystack
from kvdock_bench.longbench_files import LongBenchFiles
from kvdock_bench.people import SyntheticQuestions
from kvdock_bench.qa_files import Questions, load_questions

if TYPE_CHECKING:
    from kvdock_bench.schema import DataSources
    from kvdock_bench.tasks import Task


# Raise it when the same key starts to give another prompt: old answers must not be reused then.
GENERATOR = 2


class TaskData:
    """Hold the haystack and the question collections that a config names."""

    def __init__(self, sources: DataSources) -> None:
        self.sources = sources

    @cached_property
    def haystack(self) -> Haystack:
        """Return the prose that needles are hidden in."""
        return load_haystack(self.sources.haystack)

    @cached_property
    def _questions(self) -> dict[int, Questions]:
        made_up: dict[int, Questions] = {1: SyntheticQuestions(1), 2: SyntheticQuestions(2)}
        files = [load_questions(name) for name in self.sources.qa if name != "synthetic"]
        return made_up | {collection.hops: collection for collection in files}

    @cached_property
    def longbench(self) -> LongBenchFiles:
        """Return LongBench's rows."""
        return LongBenchFiles(self.sources.longbench)

    def qa(self, hops: int) -> Questions:
        """Return the questions that need one document (1) or two (2)."""
        return self._questions[hops]

    def describe(self, tasks: list[Task]) -> dict[str, Any]:
        """Return each task's data source, and the hash of every text behind them, for run.json."""
        hashes = {}
        if any(getattr(task, "haystack", "") == "essay" for task in tasks):
            hashes["haystack"] = self.haystack.sha256
        for task in tasks:
            if hops := getattr(task, "hops", None):
                hashes[task.name] = self.qa(hops).sha256
            if digest := getattr(task, "digest", None):
                hashes[task.name] = digest(self)
        return {
            "generator": GENERATOR,
            "tasks": {task.name: task.data_source(self) for task in tasks},
            "sha256": hashes,
        }


def load_data(sources: DataSources) -> TaskData:
    """Return the data of a config; files are opened when a task first needs them."""
    return TaskData(sources)
