"""Questions from the user's own SQuAD v2 or HotpotQA json, in the official layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvdock_bench.errors import BenchError
from kvdock_bench.people import Question
from kvdock_bench.plain_json import read_texts
from kvdock_bench.tasks.base import SampleKey


class Questions(Protocol):
    """A collection of questions that need one document (1) or two (2)."""

    hops: int
    label: str
    sha256: str

    def question(self, key: SampleKey) -> Question:
        """Return the question that belongs to a key."""


@dataclass(frozen=True, slots=True)
class _Entry:
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...]


class FileQuestions:
    """Serve the questions of a file in an order drawn from the seed, the same at every length."""

    def __init__(self, hops: int, entries: list[_Entry], name: str, digest: str) -> None:
        self.hops = hops
        self.label = f"user file: {name} ({'SQuAD' if hops == 1 else 'HotpotQA'} layout)"
        self.sha256 = digest
        self._entries = entries
        self._documents = list(dict.fromkeys(d for e in entries for d in (*e.gold, *e.near)))

    def question(self, key: SampleKey) -> Question:
        """Return the key's question with its own documents first among the others."""
        order = SampleKey(key.task, 0, 0, key.seed).rng("questions")
        chosen = order.sample(range(len(self._entries)), len(self._entries))
        entry = self._entries[chosen[key.index % len(chosen)]]
        return Question(entry.text, entry.answers, entry.gold, self._others(entry, key))

    def _others(self, entry: _Entry, key: SampleKey) -> Iterator[list[str]]:
        used = {*entry.gold, *entry.near}
        for document in entry.near:
            yield [document]
        rng = key.rng("others")
        for document in rng.sample(self._documents, len(self._documents)):
            if document not in used:
                yield [document]


@dataclass(frozen=True, slots=True)
class OfficialQuestions:
    """Questions in the order of their file, their documents by place among all, sorted, distinct.

    Args:
        asked: text, answers, the question's own documents, and those of the same article.
    """

    hops: int
    asked: list[tuple[str, tuple[str, ...], list[int], list[int]]]
    documents: list[str]


def load_official(source: str) -> OfficialQuestions:
    """Load "file:PATH" as RULER's scripts do: repeated answers and documents stay."""
    path, content, _ = _load(source)
    try:
        questions = (_official_squad if isinstance(content, dict) else _official_hotpot)(content)
        _check_texts(questions.documents)
        for text, answers, _, _ in questions.asked:
            _check_texts((text, *answers))
    except (KeyError, TypeError, ValueError) as err:
        raise _wrong_layout(path) from err
    if not questions.asked:
        raise _wrong_layout(path)
    return questions


def _official_squad(content: dict[str, Any]) -> OfficialQuestions:
    articles = [article["paragraphs"] for article in content["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    places = {text: place for place, text in enumerate(documents)}
    asked = []
    for article in articles:
        near = [places[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            own = places[paragraph["context"]]
            others = [place for place in near if place != own]
            asked += [
                (item["question"], tuple(a["text"] for a in item["answers"]), [own], others)
                for item in paragraph["qas"]
                if not item["is_impossible"]
            ]
    return OfficialQuestions(1, asked, documents)


def _official_hotpot(content: list[Any]) -> OfficialQuestions:
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in item["context"]] for item in content]
    documents = sorted({text for group in texts for text in group})
    places = {text: place for place, text in enumerate(documents)}
    asked: list[tuple[str, tuple[str, ...], list[int], list[int]]] = [
        (item["question"], (item["answer"],), [places[text] for text in group], [])
        for item, group in zip(content, texts, strict=True)
    ]
    return OfficialQuestions(2, asked, documents)


def load_questions(source: str) -> FileQuestions:
    """Load "file:PATH" and tell the two layouts apart by their shape."""
    path, content, raw = _load(source)
    try:
        hops = 1 if isinstance(content, dict) else 2
        entries = list(_squad(content) if hops == 1 else _hotpot(content))
        for entry in entries:
            _check_texts((entry.text, *entry.answers, *entry.gold, *entry.near))
    except (KeyError, TypeError, ValueError, IndexError) as err:
        raise _wrong_layout(path) from err
    if not entries:
        raise _wrong_layout(path)
    return FileQuestions(hops, entries, path.name, hashlib.sha256(raw).hexdigest())


def _load(source: str) -> tuple[Path, Any, bytes]:
    path = Path(source.removeprefix("file:"))
    try:
        path = path.expanduser()
        raw = path.read_bytes()
        return path, read_texts(raw), raw
    # a RuntimeError: there is no such user's home
    except (OSError, ValueError, RuntimeError) as err:
        raise BenchError(f"data.qa: cannot read {str(path)!r} as json ({err}).") from err


def _check_texts(values: Iterable[object]) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r:.60} is not a text")


def _wrong_layout(path: Path) -> BenchError:
    return BenchError(
        f"data.qa: {str(path)!r} holds no question in a known layout. Expected SQuAD v2 "
        "(an object with 'data') or HotpotQA (a list of objects with 'question' and 'context')."
    )


def _squad(content: dict[str, Any]) -> Iterator[_Entry]:
    for article in content["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = paragraph["context"]
            near = tuple(text for text in paragraphs if text != gold)
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible", False):
                    yield _Entry(asked["question"], answers, (gold,), near)


def _hotpot(content: list[Any]) -> Iterator[_Entry]:
    for item in content:
        documents = {title: f"{title}\n{''.join(lines)}" for title, lines in item["context"]}
        needed = {title for title, _ in item["supporting_facts"]}
        gold = tuple(text for title, text in documents.items() if title in needed)
        near = tuple(text for title, text in documents.items() if title not in needed)
        yield _Entry(item["question"], (item["answer"],), gold, near)
