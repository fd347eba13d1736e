"""One layer's entries with narrow keys, and whole ones for the last tokens.

Shapes: B rows, K key/value heads, C slots, D head_dim, D' kept channels, R slots of the ring.

A key is stored as its D' kept channels beside those of all other tokens, and its D − D' others in a
ring of the last tokens. So a block of tokens becomes narrow by moving nothing: the ring's
next tokens overwrite it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdock.policy import AttentionParams
from kvdock.storage import PolicyStorage, RowGroup
from kvdock_think.attention import Entries, attend
from kvdock_think.steps import ThinKSteps, append


class ThinKStorage(PolicyStorage):
    """Hold D' channels of every key, and all of the last ``recent`` … ``recent + block`` tokens.

    More than that many whole tokens never stand in a row: ``block`` at a time become narrow.
    """

    def __init__(self, recent: int, block: int) -> None:
        self.recent, self.block = recent, block
        self.entries: Entries | None = None
        self.positions: Tensor | None = None
        """int32 [B, K, C]; None where a row's positions are 0 … n−1."""

    @property
    def empty(self) -> bool:
        """Say whether nothing was ever stored."""
        return self.entries is None

    @property
    def held(self) -> Entries:
        """Return the entries."""
        assert self.entries is not None
        return self.entries

    @property
    def live(self) -> list[int]:  # type: ignore[override]
        """Return the entries each row holds."""
        return self.held.live

    def fill(self, groups: Sequence[RowGroup], capacity: int, *, ordered: bool) -> None:
        """Store the prompt's kept entries; all but the last ``recent`` become narrow."""
        batch = sum(len(group.rows) for group in groups)
        one = groups[0]
        assert one.channels is not None
        heads, dim, kept = one.keys.shape[1], one.keys.shape[-1], one.channels.shape[-1]
        new = one.keys.new_empty
        slots = self._ring_slots(capacity)
        self.entries = Entries(
            new(batch, heads, capacity, kept),
            new(batch, heads, slots, dim - kept),
            one.values.new_empty(batch, heads, capacity, one.values.shape[-1]),
            one.channels.new_empty(batch, heads, dim),
            [0] * batch,
            [0] * batch,
        )
        self.positions = None if ordered else _no_positions(self.entries.keys)
        for group in groups:
            assert group.channels is not None
            order = _storage_order(group.channels, dim)
            for i, row in enumerate(group.rows):
                self.entries.order[row] = order[i]
                self.entries.start[row] = max(group.length - self.recent, 0)
        self._extend(groups)

    def append(self, groups: Sequence[RowGroup], capacity: int) -> None:
        """Put a later prompt's entries behind the old ones."""
        self._reserve(capacity)
        self._extend(groups)

    def _extend(self, groups: Sequence[RowGroup]) -> None:
        held = self.held
        for group in groups:
            for i, row in enumerate(group.rows):
                first = held.live[row]
                stop = first + group.length
                held.live[row] = stop
                self._narrow(row)
                self._write(row, first, group.keys[i], group.values[i])
                if self.positions is not None:
                    self.positions[row, :, first:stop] = group.positions[i]
        held.lengths = None

    def _narrow(self, row: int) -> bool:
        """Let blocks of a row become narrow while more than recent + block tokens are whole."""
        held = self.held
        excess = held.live[row] - held.start[row] - self.recent - self.block
        blocks = max(0, -(-excess // self.block))
        held.start[row] += blocks * self.block
        return blocks > 0

    def _write(self, row: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens ``first …`` of one row: [K, N, D] and [K, N, Dv]."""
        held = self.held
        stop, kept = first + keys.shape[1], held.keys.shape[-1]
        order = held.order[row][:, None, :].expand(-1, keys.shape[1], -1)
        held.keys[row, :, first:stop] = keys.gather(2, order[..., :kept])
        held.values[row, :, first:stop] = values
        whole = max(first, held.start[row])
        if stop > whole:
            rest = keys[:, whole - first :].gather(2, order[:, whole - first :, kept:])
            held.rest[row].index_copy_(1, held.ring_index(whole, stop), rest)

    def _ring_slots(self, capacity: int) -> int:
        """Return R: the most whole tokens a row ever has."""
        return min(capacity, self.recent + self.block)

    def _reserve(self, capacity: int) -> None:
        """Make room; a ring that grows was never full, so that its slots stay where they are."""
        held = self.held
        if capacity <= held.keys.shape[2]:
            return
        held.keys, held.values = _grown(held.keys, capacity), _grown(held.values, capacity)
        held.rest = _grown(held.rest, self._ring_slots(capacity))
        if self.positions is not None:
            self.positions = _grown(self.positions, capacity)

    def append_step(self, key: Tensor, value: Tensor, positions: list[int], capacity: int) -> None:
        """Append one whole token per row: slices when the rows are even, scatters otherwise."""
        self._reserve(capacity)
        held = self.held
        if held.even:
            kept, slots = held.keys.shape[-1], held.rest.shape[2]
            turned, at = key.gather(3, held.order[:, :, None])[:, :, 0], held.live[0]
            held.keys[:, :, at], held.values[:, :, at] = turned[..., :kept], value[:, :, 0]
            held.rest[:, :, at % slots] = turned[..., kept:]
            if self.positions is not None and len(set(positions)) == 1:
                self.positions[:, :, at] = positions[0]
        else:
            append(held, key, value, self._lengths[0])
        if self.positions is not None and not (held.even and len(set(positions)) == 1):
            for row, position in enumerate(positions):
                self.positions[row, :, held.live[row]] = position
        held.live = [n + 1 for n in held.live]
        moved = [self._narrow(row) for row in range(len(held.live))]
        if any(moved):
            held.lengths = None
        elif held.lengths is not None:
            held.lengths[0] += 1

    def freeze(self, capacity: int) -> ThinKSteps:
        """Make room and return steps over the tensors as they are then."""
        self._reserve(capacity)
        return ThinKSteps(self.held, self.positions, self.recent, self.block)

    def advance(self) -> None:
        """Count a step of `freeze` on the host, by the arithmetic the device follows."""
        held = self.held
        held.live = [n + 1 for n in held.live]
        for row in range(len(held.live)):
            self._narrow(row)
        held.lengths = None

    @property
    def _lengths(self) -> Tensor:
        """Return the rows' numbers on the device."""
        held = self.held
        if held.lengths is None:
            numbers = torch.tensor([held.live, held.start], dtype=torch.int32)
            held.lengths = numbers.to(held.keys.device)
        return held.lengths

    def attend_step(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Attend with one query per row: [B, H, 1, D] → [B, 1, H, Dv]."""
        if not self.held.even:
            _ = self._lengths
        output, _ = attend(query, self.held, params.scaling, query.dtype)
        return output.transpose(1, 2)

    def attend_past(
        self, query: Tensor, rows: Sequence[int], params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Attend with later queries [b, H, Q, D] over all entries of some rows."""
        if list(rows) == list(range(len(self.live))):
            if not self.held.even:
                _ = self._lengths
            return attend(query, self.held, params.scaling)
        parts = [
            attend(query[i : i + 1], self.held.row(row), params.scaling)
            for i, row in enumerate(rows)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def row(self, index: int) -> RowGroup:
        """Return one row's entries; dropped channels are zero."""
        one = self.held.row(index)
        live, start, kept = one.live[0], one.start[0], one.keys.shape[-1]
        order = one.order[:, :, None].expand(-1, -1, live, -1)
        turned = one.keys.new_zeros(order.shape)
        turned[..., :kept] = one.keys[:, :, :live]
        turned[:, :, start:, kept:] = one.rest.index_select(2, one.ring_index(start, live))
        keys = torch.empty_like(turned).scatter_(3, order, turned)
        position = self._row_positions(index)
        return RowGroup((index,), keys, one.values[:, :, :live], position)

    def _row_positions(self, index: int) -> Tensor:
        live = self.live[index]
        if self.positions is not None:
            return self.positions[index : index + 1, :, :live].long()
        position = torch.arange(live, device=self.held.keys.device)
        return position.expand(1, self.held.keys.shape[1], live)

    def select_rows(self, index: Tensor, order: list[int]) -> None:
        """Reorder, repeat or drop rows of every tensor alike."""
        held = self.held
        for name in ("keys", "rest", "values", "order"):
            tensor = getattr(held, name)
            setattr(held, name, tensor.index_select(0, index.to(tensor.device)))
        if self.positions is not None:
            self.positions = self.positions.index_select(0, index.to(self.positions.device))
        held.live = [held.live[row] for row in order]
        held.start = [held.start[row] for row in order]
        held.lengths = None

    @property
    def even(self) -> bool:
        """Say whether all rows have the same numbers."""
        return self.held.even

    def kept_positions(self) -> Tensor:
        """Return the positions, int64 [B, K, C], −1 behind a shorter row's last."""
        batch, heads = self.held.keys.shape[:2]
        found = torch.full((batch, heads, max(self.live)), -1, device=self.held.keys.device)
        for row, live in enumerate(self.live):
            found[row, :, :live] = self._row_positions(row)[0]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return every allocated tensor by name."""
        held = self.held
        found = {"keys": held.keys, "rest": held.rest, "values": held.values, "order": held.order}
        if self.positions is not None:
            found["positions"] = self.positions
        return found

    @property
    def nbytes(self) -> int:
        """Return the allocated bytes of keys and values."""
        held = self.held
        return sum(t.untyped_storage().nbytes() for t in (held.keys, held.rest, held.values))

    @property
    def state_nbytes(self) -> int:
        """Return the allocated bytes of channel order and positions."""
        others = [self.held.order] if self.positions is None else [self.held.order, self.positions]
        return sum(t.untyped_storage().nbytes() for t in others)


def _storage_order(channels: Tensor, dim: int) -> Tensor:
    """Put the dropped channels behind the kept ones: [b, K, D'] → [b, K, D], both ascending."""
    dropped = torch.ones(*channels.shape[:2], dim, dtype=torch.int8, device=channels.device)
    dropped.scatter_(2, channels, 0)
    return dropped.argsort(dim=2, stable=True)


def _no_positions(keys: Tensor) -> Tensor:
    return torch.full(keys.shape[:3], -1, dtype=torch.int32, device=keys.device)


def _grown(old: Tensor, slots: int) -> Tensor:
    """Return the tensor with room for ``slots`` entries."""
    if old.shape[2] >= slots:
        return old
    grown = old.new_empty(*old.shape[:2], slots, *old.shape[3:])
    grown[:, :, : old.shape[2]] = old
    return grown
