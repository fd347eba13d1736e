"""Means over tasks, standard errors, and paired differences with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Groups = Iterable[Sequence[float]]
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error; the error is None where one sample leaves it unknown."""

    value: float
    error: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Paired:
    """A mean difference to the full cache on the same samples, with its 95 % interval."""

    difference: float
    low: float
    high: float
    n: int


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
    for row in filled:
        for group in row:
            weight = 1 / (len(row) * len(filled))
            picks = rng.integers(0, len(group), size=(RESAMPLES, len(group)))
            means += weight * group[picks].mean(axis=1)
            value += weight * float(group.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    n = sum(len(group) for row in filled for group in row)
    return Paired(value, float(low), float(high), n)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, gain) that no other beats, by rising cost."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point and other[0] <= point[0] and other[1] >= point[1] for other in points
        )

    front = [index for index, point in enumerate(points) if not beaten(point)]
    return sorted(front, key=lambda index: points[index])
