"""RULER's own samples, in its own order: `compat: ruler`.

The official scripts draw all samples of a task from one random stream, probes of the fit included,
so a sample exists only after those before it. Facts of the scripts (Hsieh et al., COLM 2024,
https://github.com/NVIDIA/RULER at e40fae1); their steps are coarse, and prompts shorter than asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvdock_bench.tasks.base import Sample

_TRIES = 1000
Count = Callable[[Sample, str], int]
"""Tokens of a sample's prompt with a text after it, without those a tokenizer adds by itself."""


class Maker(Protocol):
    """Draw one sample of a given size from the running stream."""

    @property
    def step(self) -> int:
        """Return by how much a size grows."""

    @property
    def most(self) -> int | None:
        """Return the largest size, None without one."""

    def make(self, size: int, index: int) -> Sample:
        """Return a sample; raises ValueError when the size is too small for its needles."""

    def answer(self, sample: Sample) -> str:
        """Return what the fit appends to the prompt before it counts tokens."""


@dataclass(slots=True)
class Streams:
    """The two random streams of the scripts, Python's and NumPy's."""

    python: random.Random
    numpy: Any


def new_streams(seed: int) -> Streams:
    """Return both streams at their start."""
    import numpy as np

    return Streams(random.Random(seed), np.random.RandomState(seed))


class OfficialSamples:
    """The samples of one task and length, made one after the other and kept."""

    def __init__(self, maker: Maker, *, length: int, budget: int, count: Count) -> None:
        self._maker, self._count = maker, count
        self._length, self._budget = length, budget
        self._made: list[tuple[Sample, int, bool]] = []
        self._size = self._fit()

    def sample(self, index: int) -> tuple[Sample, int, bool]:
        """Return a sample, its size, and whether it fits the length."""
        while len(self._made) <= index:
            self._made.append(self._next(len(self._made)))
        return self._made[index]

    def _fit(self) -> int:
        maker, size, total = self._maker, self._maker.step, 0
        while total + self._budget < self._length:
            sample = maker.make(size, 0)
            total = self._count(sample, maker.answer(sample))
            if total + self._budget > self._length:
                return size - maker.step
            if maker.most is not None and size > maker.most:
                return maker.most
            size += maker.step
        return size

    def _next(self, index: int) -> tuple[Sample, int, bool]:
        size = self._size
        for _ in range(_TRIES):
            try:
                sample = self._maker.make(size, index)
            except ValueError:
                # the scripts try for ever where not even one needle finds a place
                if size <= self._maker.step:
                    break
            else:
                if self._count(sample, "") + self._budget <= self._length:
                    return replace(sample, index=index), size, True
                if size <= self._maker.step:
                    # the scripts draw again until a shorter one comes
                    continue
            size -= self._maker.step
        return replace(self._maker.make(self._maker.step, index), index=index), size, False


def joined(references: Sequence[str]) -> str:
    """Return references as the needle tasks append them."""
    return " ".join(references)
