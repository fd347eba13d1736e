"""Prose that grows word by word and knows where its sentences end."""

from __future__ import annotations

import hashlib
import lzma
from bisect import bisect_left
from importlib import resources
from itertools import accumulate
from pathlib import Path

from kvdock_bench.errors import BenchError
from kvdock_bench.plain_json import read_texts

_TITLES = frozenset(("Mr.", "Mrs.", "Ms.", "Dr.", "St.", "Messrs.", "Col.", "Rev.", "Esq."))
_CLOSING = "\"'_)]}\u201d\u2019"


def split_sentences(words: list[str]) -> list[list[str]]:
    """Split words after a full stop, question or exclamation mark that no small letter follows."""
    sentences: list[list[str]] = []
    current: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        current.append(word)
        ends = word.rstrip(_CLOSING).endswith((".", "!", "?")) and word not in _TITLES
        if ends and not following[:1].islower():
            sentences.append(current)
            current = []
    if current:
        sentences.append(current)
    return sentences


class Haystack:
    """A text as sentences; it starts over when more words are asked for than it has."""

    def __init__(self, text: str, label: str) -> None:
        words = text.split()
        if len(words) < 100:
            raise BenchError(
                f"data.haystack: {label} has {len(words)} words; at least 100 are needed."
            )
        self.label = label
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.n_words = len(words)
        self._words = words
        self._sentences = split_sentences(words)
        self._ends = list(accumulate(len(sentence) for sentence in self._sentences))
        self._joined = [" ".join(sentence) for sentence in self._sentences]

    def words(self, start: int, stop: int) -> list[str]:
        """Return the words from one place to another; the text repeats on both sides."""
        return [self._words[place % self.n_words] for place in range(start, stop)]

    def take(self, n_words: int, start: int = 0) -> list[str]:
        """Return so many words as sentences, the first and the last of them cut where needed.

        Args:
            start: words to leave out before.
        """
        if start:
            found = split_sentences(self.words(start, start + n_words))
            return [" ".join(sentence) for sentence in found]
        rounds, rest = divmod(n_words, self.n_words)
        full = bisect_left(self._ends, rest + 1)
        taken = self._joined * rounds + self._joined[:full]
        missing = rest - (self._ends[full - 1] if full else 0)
        if missing:
            taken.append(" ".join(self._sentences[full][:missing]))
        return taken


def load_haystack(source: str) -> Haystack:
    """Load "austen", the text shipped with the package, or "file:PATH", a UTF-8 text file."""
    if source == "austen":
        packed = resources.files("kvdock_bench") / "resources" / "pride_and_prejudice.txt.xz"
        text = lzma.decompress(packed.read_bytes()).decode()
        return Haystack(text, "offline substitute: Austen, Pride and Prejudice")
    return Haystack(read_text(source), f"user file: {Path(source).name}")


def read_text(source: str) -> str:
    """Return the text of "file:PATH"; of a .json file, as RULER's essays come in, its "text"."""
    path = Path(source.removeprefix("file:"))
    try:
        path = path.expanduser()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = read_texts(text)["text"]
            if not isinstance(text, str):
                raise ValueError("its 'text' is not a text")
    # a RuntimeError: there is no such user's home
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as err:
        raise BenchError(
            f"data.haystack: cannot read {str(path)!r} as UTF-8 text ({err}). "
            "Write 'austen' or the path of a readable text file after 'file:'."
        ) from err
    return text
