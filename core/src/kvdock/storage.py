"""The contract of a layer's storage: physical slots with true positions, kept apart from columns.

Shapes: B rows, K key/value heads, H query heads, N physical slots, C kept entries, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvdock.policy import AttentionParams


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Entries of some rows that have the same length, in the order of their positions.

    Args:
        rows: rows of the batch.
        keys, values: [b, K, N, D]. positions: int64 [b, K, N].
        slot_state: [b, K, N, ...] per name.
        channels: the key channels a `ChannelPolicy` chose, int64 [b, K, D'], ascending.
    """

    rows: tuple[int, ...]
    keys: Tensor
    values: Tensor
    positions: Tensor
    slot_state: dict[str, Tensor] = field(default_factory=dict)
    channels: Tensor | None = None

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
    """Hold one layer's entries for a whole batch, from each row's first real token on."""

    live: list[int]
    """Entries each row holds."""

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Say whether nothing was ever stored."""

    @abstractmethod
    def append_step(self, key: Tensor, value: Tensor, positions: list[int], capacity: int) -> None:
        """Append one real token per row, [B, K, 1, D], with room for ``capacity`` entries a row."""

    @abstractmethod
    def attend_step(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Attend with one query per row over all live entries: [B, H, 1, D] → [B, 1, H, D]."""

    @abstractmethod
    def row(self, index: int) -> RowGroup:
        """Return one row's live entries in the model's dtype, in the order of their positions."""

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

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return every allocated tensor by name."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes allocated for keys and values, codes and scales included."""

    @property
    @abstractmethod
    def state_nbytes(self) -> int:
        """Return the bytes allocated for positions, indices and a policy's per-entry tensors."""


class FixedSteps(ABC):
    """Run decode steps over a storage's memory as it stands, on tensors alone.

    Nothing is decided on the host and no shape changes, so that a step can be captured as a CUDA
    graph. The host counts along by ``PolicyStorage.advance``.
    """

    @abstractmethod
    def append(self, key: Tensor, value: Tensor, positions: Tensor, lengths: Tensor) -> None:
        """Append one real token per row, [B, K, 1, D]; there is room for it.

        Args:
            positions: of the tokens, int64 [B]. lengths: entries before them, int32 [B].
        """

    @abstractmethod
    def attend(self, query: Tensor, lengths: Tensor, params: AttentionParams) -> Tensor:
        """Attend as ``attend_step`` does, [B, H, 1, D] → [B, 1, H, D], and end the step.

        Args:
            lengths: entries of the rows, the appended one included, int32 [B].
        """


class PolicyStorage(KVStorage):
    """Hold entries in the form a `StoragePolicy` gives them; subclass it in the method's package.

    Memory is allocated for ``capacity`` entries a row and grows, by one copy, only when the core
    names a larger one; ``nbytes`` then equals the policy's ``predicted_nbytes``.
    """

    def freeze(self, capacity: int) -> FixedSteps:
        """Make room for ``capacity`` entries a row and return what steps over them on the device.

        Called where the policy sets ``fixed_steps``; valid until any other method that writes.
        """
        raise NotImplementedError(f"{type(self).__name__}: fixed_steps is set without freeze()")

    def advance(self) -> None:
        """Count on the host a step that a `FixedSteps` made, so that eager steps can go on."""
        raise NotImplementedError(f"{type(self).__name__}: fixed_steps is set without advance()")

    @abstractmethod
    def fill(self, groups: Sequence[RowGroup], capacity: int, *, ordered: bool) -> None:
        """Store the first prompt's kept entries; ``groups`` cover every row once.

        Keys are whole, also where channels are given. ``ordered`` is that of `StoreShape`.
        """

    @abstractmethod
    def append(self, groups: Sequence[RowGroup], capacity: int) -> None:
        """Put a later prompt's entries (none for some rows) behind the old ones, in order."""

    @abstractmethod
    def attend_past(
        self, query: Tensor, rows: Sequence[int], params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Attend with many later queries over all live entries of some rows, without a mask.

        Args:
            query: [b, H, Q, D], b = len(rows).

        Returns:
            float32 [b, H, Q, D] and the natural log-sum-exps of the scores, float32 [b, H, Q].
        """
