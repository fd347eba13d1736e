"""A sentence at a chosen depth of a novel, over a grid of depths and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.errors import BenchError
from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, check_args
from kvdock_bench.tasks.suite import Suite

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

_TEXTS = ("needle", "retrieval_question", "answer")
_PERCENT = Range(0.0, 100.0)


@dataclass(frozen=True, slots=True)
class Needle:
    """Hide one sentence at sample i's depth and ask for it; the depths repeat in each round.

    A round after the first starts elsewhere in the novel.
    """

    name: str
    metric: str
    group: str = "needle"
    max_new_tokens: int = 50
    defaults: ClassVar[dict[str, Any]] = {
        "needle": "The best place in Riverton to have an old clock repaired is the workshop behind"
        " the blue bakery.",
        "retrieval_question": "What is the best place in Riverton to have an old clock repaired?",
        "answer": "the workshop behind the blue bakery",
        "document_depth_percent_min": 0,
        "document_depth_percent_max": 100,
        "document_depth_percent_intervals": 11,
    }

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown, empty or out of range."""
        bounds = {
            "document_depth_percent_min": _PERCENT,
            "document_depth_percent_max": _PERCENT,
            "document_depth_percent_intervals": Range(1, 101),
        }
        for name in _TEXTS:
            if name in args and not (isinstance(args[name], str) and args[name].strip()):
                raise BenchError(f"task_args: {self.name}.{name} is {args[name]!r}, not a text.")
        numbers = {name: value for name, value in args.items() if name not in _TEXTS}
        check_args(self.name, numbers, bounds)

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count words of the novel."""
        return 30, length

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Put the needle between two sentences of n_units words."""
        count = args["document_depth_percent_intervals"]
        low, high = args["document_depth_percent_min"], args["document_depth_percent_max"]
        turn, step = divmod(key.index, count)
        depth = (low + (high - low) * step / max(count - 1, 1)) / 100
        place = SampleKey(self.name, 0, turn, key.seed).rng("round")
        start = place.randrange(data.haystack.n_words) if turn else 0
        hay = data.haystack.take(n_units, start)
        hay.insert(_boundary(hay, depth), args["needle"])
        return Sample(
            task=self.name,
            index=0,
            context="Read the following text; a question about it comes afterwards.\n"
            + " ".join(hay),
            question=f"Question: {args['retrieval_question']} Answer with words of the text only.",
            answer_prefix=" Answer:",
            references=(args["answer"],),
            meta={"depth": round(depth, 4)},
        )

    def data_source(self, data: TaskData) -> str:
        """Name the haystack's text."""
        return data.haystack.label.removeprefix("offline substitute: ")

    def digest(self, data: TaskData) -> str:
        """Return the SHA-256 of the haystack."""
        return data.haystack.sha256


def _boundary(sentences: list[str], depth: float) -> int:
    """Return the place between two sentences that is nearest to a share of the words."""
    ends = [0, *accumulate(len(sentence.split()) for sentence in sentences)]
    return min(range(len(ends)), key=lambda place: abs(ends[place] - depth * ends[-1]))


NIAH = Suite(
    "NIAH",
    (Needle("needle", "word_overlap"), Needle("needle_rouge", "rouge_l")),
    default="needle",
)
