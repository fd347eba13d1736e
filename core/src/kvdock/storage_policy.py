"""The contracts of methods that store kept entries in a form of their own.

Shapes: b rows, H query heads, K key/value heads, N entries, W window queries, D head_dim,
D' kept key channels.

Roles act on a layer at the end of a prompt in one order: attention, tokens (`CachePolicy`),
channels (`ChannelPolicy`), quantisation (`FormatPolicy`). At most one policy takes each role.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvdock.policy import ModelFacts, PrefillView
    from kvdock.storage import PolicyStorage


@dataclass(frozen=True, slots=True)
class StoreShape:
    """Describe what one layer stores.

    Args:
        channels: key channels kept per key/value head, D'; None when all are.
        ordered: nothing was evicted, so that a row's positions are 0 … n−1 and need no memory.
    """

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    channels: int | None = None
    ordered: bool = True

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        *,
        batch: int,
        channels: Tensor | None = None,
        ordered: bool = False,
    ) -> StoreShape:
        """Read the shape off keys and values [b, K, N, D] and chosen channels [b, K, D']."""
        return cls(
            batch,
            key.shape[1],
            key.shape[-1],
            value.shape[-1],
            key.dtype,
            key.device,
            None if channels is None else channels.shape[-1],
            ordered,
        )

    @property
    def dense_entry(self) -> int:
        """Return the bytes of one uncompressed entry in all rows and heads."""
        return (self.key_dim + self.value_dim) * self.dtype.itemsize * self.batch * self.kv_heads


class StoragePolicy(ABC):
    """Decide in which form entries are stored; never which of them."""

    fixed_steps: bool = False
    """Whether the storage offers ``freeze``: decode in fixed shapes that a graph can capture."""

    @property
    def active(self) -> bool:
        """Say whether anything is stored differently; the core uses its dense storage if not."""
        return True

    @abstractmethod
    def bind(self, facts: ModelFacts) -> None:
        """Check that the model fits the method; raise ``UnsupportedError`` if it does not."""

    @abstractmethod
    def make_storage(self) -> PolicyStorage:
        """Return the empty storage of one layer; it meets its shapes in ``fill``."""

    @abstractmethod
    def predicted_nbytes(self, shape: StoreShape, capacity: int) -> int:
        """Return the bytes of keys and values with room for ``capacity`` tokens in every row.

        This is the method's own formula; ``Dock.report`` compares it with what is held.
        """


class ChannelPolicy(StoragePolicy):
    """Choose which channels of the kept keys stay."""

    query_window: int = 0
    """Number of last prompt queries that ``select_channels`` reads."""

    @abstractmethod
    def kept_channels(self, head_dim: int) -> int:
        """Return D'."""

    @abstractmethod
    def select_channels(self, view: PrefillView) -> Tensor:
        """Choose the channels of every row and key/value head.

        Args:
            view: ``queries`` are the last min(``query_window``, new tokens) of the prompt,
                ``keys`` what the token selection kept.

        Returns:
            int64 [b, K, D'], ascending.
        """


class FormatPolicy(StoragePolicy):
    """Choose the number format of the kept entries; channels, if any, are chosen already."""
