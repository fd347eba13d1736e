"""Question answering over documents, of which one (qa_1) or two (qa_2) hold the answer.

Prompt wording and task parameters follow RULER (Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
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

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Hide the question's documents among n_units pieces of others."""
        question = data.qa(self.hops).question(key)
        documents, rest = _take(question.others, n_units)
        if fill and documents:
            # a document of their own would need a heading, too coarse a step for short prompts
            documents[-1] += "".join(f" {word}" for word in islice(rest, fill))
        order = key.rng("order")
        depths = [order.random() for _ in question.gold]
        n_others = len(documents)
        for depth, gold in sorted(zip(depths, question.gold, strict=True), reverse=True):
            documents.insert(int(depth * (n_others + 1)), gold)
        meta = {"documents": len(documents), "depths": [round(d, 4) for d in depths]}
        return replace(self.worded(documents, question.text, question.answers), meta=meta)

    def worded(self, documents: list[str], question: str, answers: tuple[str, ...]) -> Sample:
        """Put RULER's words around documents and a question."""
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return Sample(
            task=self.name,
            index=0,
            context=f"{_TASK}\n\nThe following are given documents.\n\n{listed}\n\n{_TASK}\n",
            question=f"Question: {question}",
            answer_prefix=" Answer:",
            references=answers,
        )

    def data_source(self, data: TaskData) -> str:
        """Name the collection of questions."""
        return data.qa(self.hops).label


def _take(others: Iterator[list[str]], n_units: int) -> tuple[list[str], Iterator[str]]:
    """Return documents of so many pieces, the last of them cut, and the words that follow."""
    documents: list[str] = []
    cut: list[str] = []
    for pieces in others:
        documents.append(" ".join(pieces[:n_units]))
        cut = pieces[n_units:]
        n_units -= len(pieces)
        if n_units <= 0:
            break
    following = chain(cut, chain.from_iterable(others))
    return documents, (word for piece in following for word in piece.split())


QA_TASKS = (DocumentQA("qa_1", hops=1), DocumentQA("qa_2", hops=2))
