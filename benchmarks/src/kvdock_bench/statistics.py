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


def paired_difference(groups: Groups, *, seed: int = 0) -> Paired | None:
    """Return the mean over groups of the samples' differences, resampled within each group."""
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not filled:
        return None
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for group in filled:
        picks = rng.integers(0, len(group), size=(RESAMPLES, len(group)))
        means += group[picks].mean(axis=1) / len(filled)
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(np.mean([group.mean() for group in filled]))
    return Paired(value, float(low), float(high), sum(len(group) for group in filled))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, gain) that no other beats, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    best = -math.inf
    for index in order:
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front
