"""Group prompts into batches with as little padding as possible."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """One prepared prompt; `fit` is False when even the smallest one was too long.

    Args:
        n_tail: tokens at the end that are fed as a later turn, after the rest is compressed.
        likelihood: those tokens are judged, and nothing is generated.
    """

    index: int
    ids: list[int]
    sha: str
    references: list[str]
    units: int
    fit: bool
    meta: dict[str, Any] = field(default_factory=dict)
    n_tail: int = 0
    likelihood: bool = False


def make_batches(items: Iterable[Item], size: int, *, padding: bool) -> list[list[Item]]:
    """Return batches of at most `size`, prompts of like lengths together.

    Args:
        padding: without it a batch holds prompts of exactly one length.
    """
    ordered = sorted(items, key=lambda item: (len(item.ids), item.index))
    groups = [ordered]
    if not padding:
        by_length = itertools.groupby(ordered, key=lambda item: len(item.ids))
        groups = [list(group) for _, group in by_length]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]
