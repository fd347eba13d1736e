"""How many prefix entries each layer keeps: an arithmetic sequence falling from the first layer.

``base`` is the mean over the layers and ``cap`` the entries there are, 1 ≤ base ≤ cap. Every layer
keeps at least one entry.
"""

from fractions import Fraction
from functools import lru_cache
from math import floor


@lru_cache(maxsize=1024)
def exact_budgets(base: int, cap: int, layers: int, beta: float) -> tuple[int, ...]:
    """Return whole numbers that never rise and sum to ``layers * base`` exactly.

    What rounding down takes away is given back one by one to the largest remainders, ties to the
    lower layer.
    """
    if layers == 1:
        return (base,)
    top = max(Fraction(base) / Fraction(beta), Fraction(1))
    bottom = min(2 * base - top, Fraction(cap))
    step = 2 * (bottom - base) / (layers - 1)
    wanted = [bottom - layer * step for layer in range(layers)]
    counts = [floor(share) for share in wanted]
    neediest = sorted(range(layers), key=lambda layer: (counts[layer] - wanted[layer], layer))
    for layer in neediest[: layers * base - sum(counts)]:
        counts[layer] += 1
    return tuple(counts)


@lru_cache(maxsize=1024)
def official_budgets(base: int, cap: int, layers: int, beta: float) -> tuple[int, ...]:
    """Return the numbers of the authors' code, whose whole steps make the sum too large."""
    if layers == 1:
        return (base,)
    top = int(base // beta)
    bottom = 2 * base - top
    if bottom >= cap:
        bottom, top = cap, 2 * base - cap
    step = (bottom - top) // (layers - 1)
    return tuple(max(1, bottom - layer * step) for layer in range(layers))
