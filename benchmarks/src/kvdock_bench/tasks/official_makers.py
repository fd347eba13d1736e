"""How RULER's scripts draw one sample of each task; see `official` for what stands around it."""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kvdock_bench.errors import BenchError
from kvdock_bench.tasks.base import Sample, Task
from kvdock_bench.tasks.cwe import CommonWords
from kvdock_bench.tasks.fwe import DOTS, FrequentWords
from kvdock_bench.tasks.niah import DEPTHS, NOISE, Niah
from kvdock_bench.tasks.official import Maker, Streams, joined, new_streams
from kvdock_bench.tasks.qa import DocumentQA
from kvdock_bench.tasks.vt import VariableTracking, worded

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData


def make_maker(task: Task, *, length: int, seed: int, data: TaskData) -> Maker | None:
    """Return the maker of a task at its official settings; None for `fwe`, which fits by itself."""
    streams = new_streams(seed)
    if isinstance(task, Niah):
        return Needles(task, streams, seed, length, data)
    if isinstance(task, VariableTracking):
        return Chains(streams)
    if isinstance(task, CommonWords):
        words = sorted({*_raw_words("noun"), *_raw_words("adjective"), *_raw_words("verb")})
        random.Random(seed).shuffle(words)
        return Common(task, streams, seed, length, words)
    if isinstance(task, DocumentQA):
        return Documents(task, streams, seed, data)
    return None


@cache
def _raw_words(kind: str) -> tuple[str, ...]:
    from wonderwords import random_word

    return tuple(random_word._get_words_from_text_file(f"{kind}list.txt"))


@cache
def _keys() -> list[str]:
    return sorted({f"{a}-{n}" for a in _raw_words("adjective") for n in _raw_words("noun")})


@dataclass(slots=True)
class Needles:
    """The eight needle tasks."""

    task: Niah
    streams: Streams
    seed: int
    length: int
    data: TaskData
    most: int | None = None
    step: int = field(init=False)
    _essay: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.task.haystack == "essay":
            self.step = 500
            self._essay = self.data.essays
            self.most = len(self._essay)
        else:
            self.step = 25 if self.length >= 4096 else 5

    def make(self, size: int, index: int) -> Sample:
        """Draw keys, values, the haystack, places and the question, in this order."""
        rng, task = self.streams.python, self.task
        keys: list[str] = []
        values: list[list[str]] = []
        lines: list[str] = []
        for _ in range(max(task.keys, task.queries)):
            keys.append(self._draw(task.key_kind))
            values.append([self._draw(task.value_kind) for _ in range(task.values)])
            lines += [task.sentence(keys[-1], value) for value in values[-1]]
        random.Random(self.seed).shuffle(lines)
        context = self._prose(lines, size) if self._essay else self._lines(lines, size)
        asked = rng.sample(range(len(keys)), task.queries)
        references = tuple(value for place in asked for value in values[place])
        return task.worded(context, [keys[place] for place in asked], references, {})

    def answer(self, sample: Sample) -> str:
        """Return the values, joined to the prompt without a blank."""
        return joined(sample.references)

    def _draw(self, kind: str) -> str:
        rng = self.streams.python
        if kind == "words":
            return rng.choice(_keys())
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def _prose(self, needles: list[str], size: int) -> str:
        sentences = _sentences(" ".join(self._essay[:size]).strip())
        depths = self.streams.python.sample(DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths)]
        parts: list[str] = []
        for start, stop, needle in zip(places, places[1:], needles, strict=False):
            parts += [" ".join(sentences[start:stop]), needle]
        return " ".join([*parts, " ".join(sentences[places[-1] :])])

    def _lines(self, needles: list[str], size: int) -> str:
        lines = [NOISE] * size
        if self.task.haystack == "needles":
            kinds = self.task.key_kind, self.task.value_kind
            lines = [self.task.sentence(*map(self._draw, kinds)) for _ in range(size)]
        places = sorted(self.streams.python.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _sentences(text: str) -> list[str]:
    try:
        from nltk.tokenize import sent_tokenize

        return list(sent_tokenize(text))
    except (ImportError, LookupError) as error:
        raise BenchError(
            "data.compat: ruler splits the essays with nltk's punkt: install"
            " kvdock-bench[official], then python -m nltk.downloader punkt punkt_tab."
        ) from error


@dataclass(slots=True)
class Chains:
    """Variable tracking; the worked example is drawn first and stays the same."""

    streams: Streams
    step: int = 5
    most: int | None = None
    example: str = ""

    def finish_example(self, sample: Sample) -> None:
        """Keep the first sample as the example of all others."""
        shown = f"{sample.context}\n{sample.question}{sample.answer_prefix}"
        self.example = f"{shown} {joined(sample.references)}\n\n"
        self.step = 10

    def make(self, size: int, index: int) -> Sample:
        """Draw names, the value, and where the statements stand."""
        rng = self.streams.python
        letters = 5 if self.example else 3
        names = ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(5)]
        while len(set(names)) < 5:
            names.append("".join(rng.choices(string.ascii_uppercase, k=letters)))
        names = names[:5]
        value = int(self.streams.numpy.randint(10000, 99999))
        sources = [str(value), *(f"VAR {name}" for name in names)]
        lines = [NOISE] * size
        for shift, place in enumerate(sorted(rng.sample(range(size), 5))):
            lines.insert(place + shift, f"VAR {names[shift]} = {sources[shift]}")
        text, question, prefix = worded("\n".join(lines), value, 5)
        return Sample("vt", index, self.example + text, question, prefix, tuple(names))

    def answer(self, sample: Sample) -> str:
        """Return the names as Python prints a list."""
        return f" {list(sample.references)}"


@dataclass(slots=True)
class Common:
    """Common words, after a worked example of its own for every sample."""

    task: CommonWords
    streams: Streams
    seed: int
    length: int
    words: list[str]
    step: int = 10

    @property
    def most(self) -> int:
        """Return the size of the vocabulary."""
        return len(self.words)

    def make(self, size: int, index: int) -> Sample:
        """Draw the example, then the list."""
        short = self.length < 4096
        shown, shown_answer = self._list(*((20, 3, 1) if short else (40, 10, 3)))
        listed, answer = self._list(size, *((6, 1) if short else (30, 3)))
        return self.task.worded(shown, shown_answer, listed, answer)

    def answer(self, sample: Sample) -> str:
        """Return the words as a numbered list."""
        return " " + " ".join(f"{n}. {word}" for n, word in enumerate(sample.references, 1))

    def _list(self, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = self.streams.python.sample(self.words, size)
        common, rare = drawn[:10], drawn[10:]
        words = common * often + rare * seldom
        random.Random(self.seed).shuffle(words)
        return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1)), common


@dataclass(slots=True)
class Documents:
    """Question answering: question i of the file is sample i."""

    task: DocumentQA
    streams: Streams
    seed: int
    data: TaskData
    step: int = 10
    most: int | None = None
    _asked: list[Any] = field(init=False)
    _texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        found = self.data.official_questions(self.task.hops)
        self._asked, self._texts = found.asked, found.documents
        self.most = len(self._texts)

    def make(self, size: int, index: int) -> Sample:
        """Draw the other documents of a question and shuffle all."""
        if index >= len(self._asked):
            raise BenchError(
                f"data.compat: ruler: {self.task.name} has {len(self._asked)} questions, sample "
                f"{index} does not exist. Lower num_samples."
            )
        text, answers, own, near = self._asked[index]
        rng = self.streams.python
        if size >= len(self._texts):
            documents = list(self._texts)
        else:
            if size - len(own) > len(near):
                others = [i for i in range(len(self._texts)) if i not in {*own, *near}]
                chosen = [*own, *near, *rng.sample(others, max(0, size - len(own) - len(near)))]
            else:
                chosen = [*own, *rng.sample(near, size - len(own))]
            documents = [self._texts[place] for place in chosen]
        random.Random(self.seed).shuffle(documents)
        return replace(self.task.worded(documents, text, answers), index=index)

    def answer(self, sample: Sample) -> str:
        """Return the answers as Python prints a list."""
        return f" {list(sample.references)}"


class Coded:
    """Frequent words, whose script fits each sample by itself."""

    def __init__(self, task: FrequentWords, *, length: int, seed: int) -> None:
        self._task, self._length, self._seed = task, length, seed
        self._streams = new_streams(seed)

    def vocabulary(self) -> list[str]:
        """Draw the words of one sample, the most frequent first."""
        rng, size = self._streams.python, self._length // 50
        words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(size)]
        while len(set(words)) < size:
            words.append("".join(rng.choices(string.ascii_lowercase, k=6)))
        words = sorted(set(words))
        random.Random(self._seed).shuffle(words)
        words[0] = DOTS
        return words

    def text(self, words: Sequence[str], total: int) -> Sample:
        """Return the sample with counts from the zeta law for so many words."""
        counts = [int(total * rank**-2.0 / (math.pi**2 / 6)) for rank in range(1, len(words) + 1)]
        repeated = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        random.Random(self._seed).shuffle(repeated)
        return self._task.worded(" ".join(repeated), tuple(words[1:4]))
