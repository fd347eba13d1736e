"""LongBench: 21 tasks in English and Chinese, from the hub or from a folder of the user.

Prompts, answer lengths, truncation and scoring follow Bai et al., ACL 2024
(https://arxiv.org/abs/2308.14508).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from kvdock_bench.errors import BenchError
from kvdock_bench.tasks.base import Args, Sample, SampleKey, check_args
from kvdock_bench.tasks.suite import Suite

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

# Few-shot and code prompts go to the model as they are; of the few-shot ones' answers, only the
# first line counts.
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
_NO_TEMPLATE = (*_FIRST_LINE, "lcc", "repobench-p")


@dataclass(frozen=True, slots=True)
class LongBenchTask:
    """Ask the rows of one of LongBench's files, in their order.

    Args:
        context: the prompt's beginning, with a place for the row's context.
        rest: what follows, with a place for the row's input where there is one.
    """

    name: str
    group: str
    metric: str
    max_new_tokens: int
    context: str
    rest: str
    defaults: ClassVar[dict[str, Any]] = {}

    def check_args(self, args: Args) -> None:
        """Raise BenchError: the task takes no arguments."""
        check_args(self.name, args, {})

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Return one size: the prompts do not grow."""
        return 1, 1

    def size(self, data: TaskData) -> int:
        """Return the number of rows; raises BenchError where a classification has no classes."""
        rows = data.longbench.rows(self.name)
        if self.metric == "classification" and not all(row.get("all_classes") for row in rows):
            raise BenchError(f"{self.name}.jsonl: a row has no 'all_classes' to choose from.")
        return len(rows)

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Return the row of the key's index as a prompt."""
        row = data.longbench.rows(self.name)[key.index]
        meta: dict[str, Any] = {"language": row["language"]} if row.get("language") else {}
        if self.metric == "classification":
            meta["classes"] = row["all_classes"]
        if self.name in _FIRST_LINE:
            meta["first_line"] = True
        return Sample(
            task=self.name,
            index=key.index,
            context=self.context.replace("{context}", row["context"]),
            question=self.rest.replace("{input}", row["input"]),
            answer_prefix="",
            references=tuple(row["answers"]),
            meta=meta,
            joint="",
        )

    def data_source(self, data: TaskData) -> str:
        """Name where the rows come from."""
        return data.longbench.label

    def digest(self, data: TaskData) -> str:
        """Return the SHA-256 of the task's file."""
        return data.longbench.digest(self.name)


def _read() -> tuple[LongBenchTask, ...]:
    text = (resources.files("kvdock_bench") / "resources" / "longbench.yaml").read_text("utf-8")
    return tuple(LongBenchTask(name, **entry) for name, entry in yaml.safe_load(text).items())


_TASKS = _read()

LONGBENCH = Suite(
    "LongBench",
    _TASKS,
    groups={
        "en": tuple(
            task.name
            for task in _TASKS
            if task.name not in ("dureader", "vcsum", "lsht") and not task.name.endswith("_zh")
        ),
        **{
            group: tuple(task.name for task in _TASKS if task.group == group)
            for group in dict.fromkeys(task.group for task in _TASKS)
        },
    },
    fitted=False,
    no_template=_NO_TEMPLATE,
    cut_first=True,
)
