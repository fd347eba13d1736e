"""Frequent words: name the three coded words that appear most, drawn from a zeta law.

Prompt wording and task parameters follow RULER (Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, check_args

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

DOTS = "..."


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """Ask for ranks two to four; rank one is a run of dots that the question says to ignore."""

    name: str = "fwe"
    group: str = "aggregation"
    metric: str = "string_match_all"
    max_new_tokens: int = 50
    defaults: ClassVar[dict[str, Any]] = {"alpha": 2.0}

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown or out of range."""
        check_args(self.name, args, {"alpha": Range(1.1, 4.0)})

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count words of the text; enough of them that ranks two to five differ."""
        share = 1 / _zeta(args["alpha"])
        gap = share * (4 ** -args["alpha"] - 5 ** -args["alpha"])
        low = math.ceil(1 / gap)
        return low, max(low, length)

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Repeat each coded word as often as its rank says and shuffle."""
        rng = key.rng("words")
        coded: dict[str, None] = {}
        while len(coded) < max(5, key.length // 50):
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        words = [DOTS, *coded]
        alpha, total = args["alpha"], _zeta(args["alpha"])
        counts = [int(n_units * rank**-alpha / total) for rank in range(1, len(words) + 1)]
        # The question says to ignore the dots, so more of them only make the text longer.
        counts[0] += fill
        text = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        key.rng("order").shuffle(text)
        meta = {"counts": counts[:6], "args": dict(args)}
        return replace(self.worded(" ".join(text), tuple(words[1:4])), meta=meta)

    def worded(self, text: str, references: tuple[str, ...]) -> Sample:
        """Put RULER's words around a coded text."""
        return Sample(
            task=self.name,
            index=0,
            context="Read the following coded text and track the frequency of each coded word."
            f" Find the three most frequently appeared coded words. {text}",
            question="Question: Do not provide any explanation. Please ignore the dots '....'. What"
            " are the three most frequently appeared words in the above coded text?",
            answer_prefix=" Answer: According to the coded text above, the three most frequently"
            " appeared words are:",
            references=references,
        )

    def data_source(self, data: TaskData) -> str:
        """Everything is generated, as in RULER."""
        return "as RULER: generated"


def _zeta(alpha: float, terms: int = 100) -> float:
    """Return Riemann's zeta: the first terms, then the integral of the rest."""
    head = sum(rank**-alpha for rank in range(1, terms))
    return float(head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2)
