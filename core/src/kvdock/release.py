"""Say how decode gives entries up, in terms that the core has a kernel for.

Shapes: B rows, K key/value heads, N slots, S sinks, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Following:
    """Say that the entries which always stay follow the others: their keys turn at every eviction.

    Args:
        raw: name of the per-row state with their keys unturned, [B, K, S, D].
        evicted: name of the per-row state that counts evicted entries, int64 [B].
        width: S.
    """

    raw: str
    evicted: str
    width: int


@dataclass(frozen=True, slots=True)
class ReleaseRule:
    """Describe what `CachePolicy.observe_step` and `release` do in one layer.

    Decode in fixed shapes then runs one kernel in their place, where it gives up the same slots on
    a small case. Of the entries that may go, the one worth least goes; of equals the one at the
    highest position.

    Args:
        worth: "age": the oldest goes. "sum": the attention an entry received so far, kept in the
            per-entry state ``state``, float32 [B, K, N]. "step": what it receives from this step.
        stays: int64 [B]: "age": so many first positions stay; else so many last entries.
        state: name of the per-entry state of "sum".
        mean: average over the query heads of a group instead of summing up.
        pool: odd number of neighbours, in the order of positions, that "step" averages over.
        following: "age": how the first entries move.
    """

    worth: Literal["age", "sum", "step"]
    stays: Tensor
    state: str = ""
    mean: bool = True
    pool: int = 1
    following: Following | None = None
