"""Question answering over documents, of which one (qa_1) or two (qa_2) hold the answer.

Prompt wording and task parameters follow RULER (Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.tasks.base import Args, Sample, SampleKey, check_args

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

_TASK = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words."
)


@dataclass(frozen=True, slots=True)
class DocumentQA:
    """Ask a question whose documents lie anywhere among others."""

    name: str
    hops: int
    group: str = "qa"
    metric: str = "string_match_part"
    max_new_tokens: int = 32
    defaults: ClassVar[dict[str, Any]] = {}

    def check_args(self, args: Args) -> None:
        """Raise BenchError: the task takes no arguments."""
        check_args(self.name, args, {})

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count pieces of other documents: sentences of made-up ones, else whole documents."""
        return 1, max(1, length // 5)

    def build(self, n_units: int, key: SampleKey, args: Args, data: TaskData) -> Sample:
        """Hide the question's documents among n_units pieces of others."""
        question = data.qa(self.hops).question(key)
        documents: list[str] = []
        for pieces in question.others:
            if n_units <= 0:
                break
            documents.append(" ".join(pieces[:n_units]))
            n_units -= len(pieces)
        order = key.rng("order")
        depths = [order.random() for _ in question.gold]
        n_others = len(documents)
        for depth, gold in sorted(zip(depths, question.gold, strict=True), reverse=True):
            documents.insert(int(depth * (n_others + 1)), gold)
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return Sample(
            task=self.name,
            index=0,
            context=f"{_TASK}\n\nThe following are given documents.\n\n{listed}\n\n{_TASK}\n",
            question=f"Question: {question.text}",
            answer_prefix=" Answer:",
            references=question.answers,
            meta={"documents": len(documents), "depths": [round(d, 4) for d in depths]},
        )

    def data_source(self, data: TaskData) -> str:
        """Name the collection of questions."""
        return data.qa(self.hops).label


QA_TASKS = (DocumentQA("qa_1", hops=1), DocumentQA("qa_2", hops=2))
