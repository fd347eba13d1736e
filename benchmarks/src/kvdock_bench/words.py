"""Word lists of the package wonderwords: needle keys and the vocabulary of counted words."""

from __future__ import annotations

import random
from functools import cache
from importlib import resources


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """Return the sorted, distinct plain words of a list: "noun", "adjective" or "verb"."""
    text = resources.files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text("utf-8")
    # Words with capitals, blanks or signs would make keys ambiguous, and there are few of them.
    words = {line.strip() for line in text.splitlines()}
    return tuple(sorted(word for word in words if word.isalpha() and word.islower()))


@cache
def vocabulary() -> tuple[str, ...]:
    """Return all nouns, adjectives and verbs, each once."""
    return tuple(sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")}))


def word_key(rng: random.Random) -> str:
    """Draw a key such as "quiet-harbor"."""
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"
