"""Follow one row of a batch through the layers of a prompt."""

from dataclasses import dataclass, field

from torch import Tensor

from kvdock_cakekv.allocation import ceilings, shares, whole


@dataclass
class Cascade:
    """Hold what the layers so far want and what ranks their entries.

    Args:
        layers: number of layers in the model.
        total: prefix entries that all of them may keep together.
        cap: prefix entries of the row.
        window: last entries that every layer keeps on top.
        entry_bytes: bytes of one entry of all key/value heads in one layer.
        preferences: one per layer so far.
        indicators: how much each kept prefix entry matters, float32 [1, K, N] per layer so far.
    """

    layers: int
    total: int
    cap: int
    window: int
    entry_bytes: int
    preferences: list[float] = field(default_factory=list)
    indicators: list[Tensor] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all prefix entries that may stay."""
        return self.total * self.entry_bytes

    def targets(self) -> list[int]:
        """Return the prefix entries each layer so far may keep; the last layer makes them exact."""
        parts = shares(self.preferences, self.total, self.cap)
        if len(parts) < self.layers:
            return ceilings(parts, self.cap)
        return whole(parts, min(self.total, self.cap * self.layers))
