"""Needle in a haystack: eight tasks, from one number in noise to keys hidden among their like.

Prompt wording and task parameters follow RULER (Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, check_args
from kvdock_bench.words import word_key

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# RULER hides needles at a random choice of these shares of the essay.
DEPTHS = tuple(round(step * 100 / 39) for step in range(40))


@dataclass(frozen=True, slots=True)
class Niah:
    """Hide sentences "the magic number for KEY is: VALUE" and ask for some of the values."""

    name: str
    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    group: str = "niah"
    metric: str = "string_match_all"
    max_new_tokens: int = 128

    @property
    def defaults(self) -> dict[str, Any]:
        """Return RULER's numbers of keys, values a key, and keys asked for."""
        return {
            "num_needle_k": self.keys,
            "num_needle_v": self.values,
            "num_needle_q": self.queries,
        }

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown or out of range."""
        check_args(self.name, args, dict.fromkeys(self.defaults, Range(1, 40)))

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count words of prose, or lines of noise or distractors."""
        if self.haystack == "essay":
            return 30, length
        return 2, max(2, length // 10)

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Hide the needles in n_units of haystack and ask for the queried ones."""
        n_values, n_queries = args["num_needle_v"], args["num_needle_q"]
        n_keys = max(args["num_needle_k"], n_queries)
        pairs = _fresh_pairs(key.rng("needles"), self.key_kind, self.value_kind)
        needles: list[tuple[str, str]] = []
        for _ in range(n_keys):
            name, first = next(pairs)
            needles += [(name, first), *((name, next(pairs)[1]) for _ in range(n_values - 1))]
        asked = list(dict.fromkeys(name for name, _ in needles))[:n_queries]
        references = tuple(value for name, value in needles if name in asked)
        key.rng("order").shuffle(needles)
        lines = [self.sentence(*needle) for needle in needles]
        if self.haystack == "essay":
            context, depths = _hide_in_prose(lines, data.haystack.take(n_units), key.rng("depth"))
        else:
            hay = [NOISE] * n_units
            if self.haystack == "needles":
                # The same stream as the needles' own: no distractor repeats a key or a value.
                hay = [self.sentence(*next(pairs)) for _ in range(n_units)]
            context, depths = _hide_in_lines(lines, hay, key.rng("depth"))
            context += padding(fill)
        meta = {"depths": depths, "keys": asked, "args": dict(args)}
        return self.worded(context, asked, references, meta)

    def data_source(self, data: TaskData) -> str:
        """Name the haystack's text."""
        return data.haystack.label if self.haystack == "essay" else "as RULER: generated"

    def sentence(self, name: str, value: str) -> str:
        """Return the needle of a key and a value."""
        return f"One of the special magic {self.value_kind} for {name} is: {value}."

    def worded(
        self, context: str, asked: list[str], references: tuple[str, ...], meta: dict[str, Any]
    ) -> Sample:
        """Put RULER's words around a haystack and the keys asked for."""
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        one = len(references) == 1
        kind = self.value_kind[:-1] if one else self.value_kind
        intro = (
            f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within"
        )
        return Sample(
            task=self.name,
            index=0,
            context=f"{intro} the following text. Make sure to memorize it. I will quiz you about"
            f" the {kind} afterwards.\n{context}",
            question=f"What {'is' if one else 'are all'} the special magic {kind} for {query}"
            " mentioned in the provided text?",
            answer_prefix=f" The special magic {kind} for {query} mentioned in the provided text"
            f" {'is' if one else 'are'}",
            references=references,
            meta=meta,
        )


def padding(n_words: int) -> str:
    """Return lines of noise, the last of them cut, each after a line end."""
    words = NOISE.split()
    cut = [NOISE] * (n_words // len(words)) + [" ".join(words[: n_words % len(words)])]
    return "".join(f"\n{line}" for line in cut if line)


def _fresh_pairs(rng: random.Random, key_kind: str, value_kind: str) -> Iterator[tuple[str, str]]:
    """Yield keys and values without end, never one twice."""
    seen: set[str] = set()

    def fresh(kind: str) -> str:
        while (drawn := _draw(rng, kind)) in seen:
            pass
        seen.add(drawn)
        return drawn

    while True:
        yield fresh(key_kind), fresh(value_kind)


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "words":
        return word_key(rng)
    if kind == "numbers":
        return str(rng.randrange(1_000_000, 10_000_000))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _hide_in_prose(
    needles: list[str], sentences: list[str], rng: random.Random
) -> tuple[str, list[float]]:
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    hay = list(sentences)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        hay.insert(len(sentences) * depth // 100, needle)
    return " ".join(hay), [depth / 100 for depth in depths]


def _hide_in_lines(
    needles: list[str], lines: list[str], rng: random.Random
) -> tuple[str, list[float]]:
    # Shares drawn before the number of lines is known keep a needle's depth while the fit probes.
    depths = sorted(rng.random() for _ in needles)
    hay = list(lines)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        hay.insert(int(depth * (len(lines) + 1)), needle)
    return "\n".join(hay), [round(depth, 4) for depth in depths]


NIAH_TASKS = (
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "essay"),
    Niah("niah_single_3", "essay", value_kind="uuids"),
    Niah("niah_multikey_1", "essay", keys=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
    Niah("niah_multivalue", "essay", values=4),
    Niah("niah_multiquery", "essay", keys=4, queries=4),
)
