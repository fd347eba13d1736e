"""Read an answer from its tokens, in one way for every server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def read_answer(
    tokenizer: Any, tokens: Sequence[int], ends: set[int], stop: Sequence[str]
) -> tuple[str, int, str]:
    """Return the text, the number of tokens up to the first end token, and why it ended.

    Args:
        tokens: what was generated; anything after the first end token is padding.
        stop: texts at the first of which the answer is cut.
    """
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    count = len(tokens) if end is None else end + 1
    text = tokenizer.decode(list(tokens[:count]), skip_special_tokens=True)
    cuts = [text.index(word) for word in stop if word in text]
    stopped = end is not None or bool(cuts)
    return text[: min(cuts)] if cuts else text, count, "stop" if stopped else "length"
