"""How well the model predicts a novel after its context is compressed: perplexity, offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, check_args
from kvdock_bench.tasks.suite import Suite

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData


@dataclass(frozen=True, slots=True)
class Continuation:
    """Judge the words that follow a context; they are the same at every length of the context.

    The places lie all over the novel, at random by sample and seed.
    """

    name: str
    metric: str
    group: str = "text"
    max_new_tokens: int = 0
    defaults: ClassVar[dict[str, Any]] = {"words": 128}

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown or out of range."""
        check_args(self.name, args, {"words": Range(2, 4096)})

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count words of context."""
        return 30, length

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Take n_units words before a place, and the judged words after it."""
        total, judged = data.haystack.n_words, args["words"]
        # Both tasks and all lengths judge the same words; a context may reach over the start.
        place = SampleKey("text", 0, key.index, key.seed).rng("place").randrange(total - judged)
        before = data.haystack.words(place - n_units, place)
        after = data.haystack.words(place, place + judged)
        return Sample(
            task=self.name,
            index=0,
            context=" ".join(before),
            question=" ".join(after),
            answer_prefix="",
            references=(" ".join(after),),
            meta={"place": place},
            joint=" ",
            likelihood=True,
        )

    def data_source(self, data: TaskData) -> str:
        """Name the novel."""
        return data.haystack.label.removeprefix("offline substitute: ")

    def digest(self, data: TaskData) -> str:
        """Return the SHA-256 of the novel."""
        return data.haystack.sha256


_TASKS = (Continuation("perplexity", "token_probability"), Continuation("next_token", "next_token"))

TEXT = Suite("perplexity", _TASKS, no_template=tuple(task.name for task in _TASKS))
