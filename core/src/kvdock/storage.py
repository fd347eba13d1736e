"""The contract of a layer's storage: physical slots with true positions, kept apart from columns.

Shapes: B rows, K key/value heads, H query heads, N physical slots, C kept entries, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvdock.layout import BatchLayout
from kvdock.policy import AttentionParams


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Entries of some rows that have the same length, in the order of their positions.

    Args:
        rows: rows of the batch.
        keys, values: [b, K, N, D]. positions: int64 [b, K, N].
        slot_state: [b, K, N, ...] per name.
    """

    rows: tuple[int, ...]
    keys: Tensor
    values: Tensor
    positions: Tensor
    slot_state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Return N."""
        return self.keys.shape[2]


def grown_capacity(capacity: int, need: int, limit: int | None) -> int:
    """Return the new number of allocated slots when decode needs ``need`` of them.

    Growing by an eighth (16 to 256 slots) keeps the copies rare and the slack small; ``limit`` is
    what a row bounded during decode can ever need.
    """
    if need <= capacity:
        return capacity
    room = min(max(capacity // 8, 16), 256)
    grown = max(need, capacity + room)
    return grown if limit is None else max(need, min(grown, limit))


class KVStorage(ABC):
    """Hold one layer's entries for a whole batch; subclass it for a format of its own."""

    live: list[int]
    """Entries each row holds."""

    @abstractmethod
    def fill(self, groups: Sequence[RowGroup]) -> None:
        """Replace all entries by those of ``groups``, which cover every row once."""

    @abstractmethod
    def extend(self, layout: BatchLayout, key: Tensor, value: Tensor, starts: list[int]) -> None:
        """Append a forward's real tokens, row by row; row b's first has position ``starts[b]``."""

    @abstractmethod
    def append_step(
        self, key: Tensor, value: Tensor, positions: list[int], limit: int | None
    ) -> None:
        """Append one real token per row, [B, K, 1, D], into its released or next free slot."""

    @abstractmethod
    def attend_step(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Attend with one query per row over all live entries: [B, H, 1, D] → [B, 1, H, D]."""

    @abstractmethod
    def release(self, slot: Tensor, over: list[bool]) -> None:
        """Empty one slot [B, K] in each row that is ``over``; the next step overwrites it."""

    @abstractmethod
    def put_state(self, states: dict[str, Tensor], row: int | None = None) -> None:
        """Write the policy's per-entry tensors [b, K, N, ...] of one row, or of all."""

    @abstractmethod
    def row(self, index: int) -> RowGroup:
        """Return one row's live entries in the order of their positions."""

    @abstractmethod
    def select_rows(self, index: Tensor, order: list[int]) -> None:
        """Reorder, repeat or drop rows: ``index`` on the device, ``order`` the same on the host.

        ``order`` may name any row when all rows are ``even``.
        """

    @property
    @abstractmethod
    def even(self) -> bool:
        """Say whether all rows use their slots alike."""

    @abstractmethod
    def kept_positions(self) -> Tensor:
        """Return int64 [B, K, C], ascending, −1 for empty slots."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes allocated for keys and values."""

    @property
    @abstractmethod
    def state_nbytes(self) -> int:
        """Return the bytes allocated for positions and the policy's own per-entry tensors."""
