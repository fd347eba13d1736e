"""The texts of one run, loaded when first needed and described for its record."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvdock_bench.errors import BenchError
from kvdock_bench.haystack import Haystack, load_haystack, read_text
from kvdock_bench.longbench_files import LongBenchFiles
from kvdock_bench.people import SyntheticQuestions
from kvdock_bench.qa_files import OfficialQuestions, Questions, load_official, load_questions

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
    def essays(self) -> list[str]:
        """Return the words of the essays as RULER's scripts cut them."""
        if self.sources.haystack == "austen":
            raise BenchError(
                "data.compat: ruler needs RULER's essays. Set data.haystack to "
                "'file:PaulGrahamEssays.json', the file that its download script makes."
            )
        return re.sub(r"\s+", " ", read_text(self.sources.haystack)).split(" ")

    def official_questions(self, hops: int) -> OfficialQuestions:
        """Return questions and documents as RULER's scripts read them."""
        for source in self.sources.qa:
            if source != "synthetic":
                questions = load_official(source)
                if questions.hops == hops:
                    return questions
        name = "SQuAD's dev-v2.0.json" if hops == 1 else "HotpotQA's hotpot_dev_distractor_v1.json"
        raise BenchError(f"data.compat: ruler needs {name}. Add it to data.qa as 'file:PATH'.")

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
        compat = {} if self.sources.compat == "native" else {"compat": self.sources.compat}
        return {
            "generator": GENERATOR,
            "tasks": {task.name: task.data_source(self) for task in tasks},
            "sha256": hashes,
            **compat,
        }


def load_data(sources: DataSources) -> TaskData:
    """Return the data of a config; files are opened when a task first needs them."""
    return TaskData(sources)
