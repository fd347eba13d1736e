"""Means over tasks, standard errors, and paired differences with interval and significance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Groups = Iterable[Sequence[float]]
RESAMPLES = 2000
LEVEL = 0.05
_GRID = 4096


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error; the error is None where one sample leaves it unknown."""

    value: float
    error: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Paired:
    """A mean difference on the same samples, with its 95 % interval and its p-value.

    Args:
        p: of the sign-flip test. Unlike the interval it knows that few samples prove nothing.
    """

    difference: float
    low: float
    high: float
    n: int
    p: float

    @property
    def within_noise(self) -> bool:
        """Tell whether the difference may be chance."""
        return self.p >= LEVEL or self.low <= 0 <= self.high


def mean_of_groups(groups: Groups) -> Mean | None:
    """Return the mean of the groups' means: every task counts the same.

    The groups are fixed, so the error comes from the samples within them only.
    """
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not filled:
        return None
    error = None
    if all(len(group) > 1 for group in filled):
        variances = [group.var(ddof=1) / len(group) for group in filled]
        error = math.sqrt(sum(variances)) / len(filled)
    value = float(np.mean([group.mean() for group in filled]))
    return Mean(value, error, sum(len(group) for group in filled))


def paired_difference(rows: Sequence[Groups], *, seed: int = 0) -> Paired | None:
    """Return the mean over rows of the mean over groups, resampled within each group.

    Args:
        rows: for each length the samples' differences by task; a row without any is left out.
    """
    filled = [[np.asarray(g, dtype=float) for g in row if len(g)] for row in rows]
    filled = [row for row in filled if row]
    if not filled:
        return None
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    value = 0.0
    parts = []
    for row in filled:
        for group in row:
            weight = 1 / (len(row) * len(filled))
            picks = rng.integers(0, len(group), size=(RESAMPLES, len(group)))
            means += weight * group[picks].mean(axis=1)
            value += weight * float(group.mean())
            parts.append(weight / len(group) * group)
    low, high = np.percentile(means, [2.5, 97.5])
    terms = np.concatenate(parts)
    return Paired(value, float(low), float(high), len(terms), sign_flip_p(terms))


def sign_flip_p(terms: np.ndarray) -> float:
    """Return the chance that random signs of these differences give a sum as far from 0.

    It is exact for magnitudes rounded to a grid: the characteristic function of the sum of the
    randomly signed steps is a product of cosines, whose inverse transform is its distribution.
    """
    terms = terms[terms != 0]
    if not len(terms):
        return 1.0
    share = np.abs(terms) / np.abs(terms).sum()
    steps = np.maximum(1, np.rint(share * _GRID)).astype(np.int64)
    total = int(steps.sum())
    reached = abs(int((np.sign(terms) * steps).sum()))
    size = 2 * total + 1
    turns = 2 * np.pi * np.arange(size) / size
    product = np.ones(size)
    for step, count in zip(*np.unique(steps, return_counts=True), strict=True):
        product *= np.cos(step * turns) ** count
    chances = np.fft.fft(product).real / size
    # place k of the transform is the sum k; sums below 0 follow from the end
    sums = np.minimum(np.arange(size), size - np.arange(size))
    return float(np.clip(chances[sums >= reached].sum(), 0.0, 1.0))


def false_discovery(chances: Sequence[float]) -> list[float]:
    """Return p-values adjusted after Benjamini and Hochberg, in the order given."""
    order = np.argsort(chances)[::-1]
    adjusted = np.ones(len(chances))
    lowest = 1.0
    for place, index in enumerate(order):
        lowest = min(lowest, chances[index] * len(chances) / (len(chances) - place))
        adjusted[index] = lowest
    return [float(value) for value in adjusted]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, gain) that no other beats, by rising cost."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in points
        )

    front = [index for index, point in enumerate(points) if not beaten(point)]
    return sorted(front, key=lambda index: points[index])
