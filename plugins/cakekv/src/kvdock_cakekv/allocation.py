"""Share a budget of prefix entries between layers by water-filling, in reals and whole numbers.

A layer of weight p gets clamp(λ·p, 1, cap) with the one λ that spends the total. More layers can
only lower λ, so no share ever grows while a prompt goes through the model.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import floor

ROUNDING = 1e-6
"""More than the error of a share, less than anything that matters."""


def shares(weights: Sequence[float], total: int, cap: int) -> list[float]:
    """Return each layer's share of ``total``.

    Args:
        weights: the layers' preferences, all > 0; their scale is immaterial.
        total: entries to spend over these layers; what exceeds ``cap`` for each stays unspent.
        cap: entries there are in a layer.
    """
    total = min(total, cap * len(weights))
    if total < len(weights):  # only a budget the window fills
        return [total / len(weights)] * len(weights)

    def spent(level: float) -> float:
        return sum(min(max(level * weight, 1.0), cap) for weight in weights)

    bends = sorted([1 / weight for weight in weights] + [cap / weight for weight in weights])
    bend = bends[max(bisect_right(bends, float(total), key=spent) - 1, 0)]
    free = [weight for weight in weights if 1 / weight <= bend < cap / weight]
    full = sum(cap / weight <= bend for weight in weights)
    rest = total - full * cap - (len(weights) - full - len(free))
    level = rest / sum(free) if free else bend
    return [float(min(max(level * weight, 1.0), cap)) for weight in weights]


def ceilings(parts: Sequence[float], cap: int) -> list[int]:
    """Return whole numbers that no later share of the same layer can exceed, rounding included."""
    return [min(cap, floor(part + ROUNDING) + 1) for part in parts]


def whole(parts: Sequence[float], total: int) -> list[int]:
    """Round to whole numbers of sum ``total``: down, then up for the largest remainders.

    Equal remainders go to the lower layer.
    """
    counts = [floor(part) for part in parts]
    neediest = sorted(range(len(parts)), key=lambda layer: (counts[layer] - parts[layer], layer))
    for layer in neediest[: total - sum(counts)]:
        counts[layer] += 1
    return counts
