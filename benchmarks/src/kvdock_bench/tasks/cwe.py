"""Common words: name the ten words that a numbered list repeats most.

Prompt wording and task parameters follow RULER (Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, check_args
from kvdock_bench.words import vocabulary

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

# Words left over for the worked example, so that it never shares one with the list.
_KEPT_FOR_EXAMPLE = 400


@dataclass(frozen=True, slots=True)
class CommonWords:
    """Ask for the common words of a list; a worked example comes first from 1024 tokens on."""

    name: str = "cwe"
    group: str = "aggregation"
    metric: str = "string_match_all"
    max_new_tokens: int = 120
    defaults: ClassVar[dict[str, Any]] = {
        "num_cw": 10,
        "freq_cw": None,
        "freq_ucw": None,
        "one_shot": None,
    }

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown or out of range."""
        often = Range(1, 1000)
        bounds = {"num_cw": Range(1, 50), "freq_cw": often, "freq_ucw": often}
        check_args(self.name, args, bounds, switches=("one_shot",))

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count distinct uncommon words."""
        most = len(vocabulary()) - args["num_cw"] - _KEPT_FOR_EXAMPLE
        return 2, max(2, min(most, length // 2))

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Mix the common words with n_units others that appear less often."""
        n_common = args["num_cw"]
        often, seldom, one_shot = _frequencies(key.length, args)
        words = list(vocabulary())
        key.rng("words").shuffle(words)
        example, words = words[:_KEPT_FOR_EXAMPLE], words[_KEPT_FOR_EXAMPLE:]
        common, rare = words[:n_common], words[n_common : n_common + n_units]
        main = _numbered(common * often + rare * seldom, key.rng("order"))
        listed = ""
        shown: list[str] = []
        if one_shot:
            often_shown, seldom_shown, n_rare = (10, 3, 30) if key.length >= 4096 else (3, 1, 10)
            shown, filler = example[:n_common], example[n_common : n_common + n_rare]
            listed = _numbered(shown * often_shown + filler * seldom_shown, key.rng("example"))
        meta = {"freq_cw": often, "freq_ucw": seldom, "one_shot": one_shot, "args": dict(args)}
        return replace(self.worded(listed, shown, main, common), meta=meta)

    def worded(
        self, example: str, shown: Sequence[str], listed: str, common: Sequence[str]
    ) -> Sample:
        """Put RULER's words around a numbered list, after a worked example if there is one."""
        question = f"Question: What are the {len(common)} most common words in the above list?"
        prefix = f" Answer: The top {len(common)} words that appear most often in the list are:"
        context = _intro(listed)
        if example:
            answer = " ".join(f"{place}. {word}" for place, word in enumerate(shown, 1))
            context = f"{_intro(example)}\n{question}{prefix} {answer}\n{context}"
        return Sample(self.name, 0, context, question, prefix, tuple(common))

    def data_source(self, data: TaskData) -> str:
        """The words are those RULER uses."""
        return "as RULER: generated"


def _frequencies(length: int, args: Args) -> tuple[int, int, bool]:
    """Return RULER's repetitions, smaller for short lists, unless the config sets them."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1) if length >= 1024 else (4, 1)
    often = args["freq_cw"] or often
    seldom = args["freq_ucw"] or seldom
    one_shot = length >= 1024 if args["one_shot"] is None else args["one_shot"]
    return often, seldom, one_shot


def _numbered(words: list[str], rng: random.Random) -> str:
    rng.shuffle(words)
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def _intro(listed: str) -> str:
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{listed}"
    )
