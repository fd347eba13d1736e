"""Keys and values as the model made them, in preallocated slots.

Shapes: B rows, K key/value heads, H query heads, N physical slots, D head_dim. Slots hold real
tokens only: a row uses slots ``0 … used−1``, and position −1 marks an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdock.kernels.slots import attend_filled
from kvdock.layout import BatchLayout
from kvdock.policy import AttentionParams
from kvdock.storage import KVStorage, RowGroup

KEY, VALUE, POSITION = "key", "value", "position"


class DenseStorage(KVStorage):
    """Keep keys and values as the model made them, in preallocated slots."""

    def __init__(self) -> None:
        self.table: dict[str, Tensor] = {}
        self.used: list[int] = []
        self.live: list[int] = []
        self.released: Tensor | None = None
        self.holes: list[bool] = []
        self._ordered = True
        """Whether slots are in the order of their positions, without an empty one between."""

    @property
    def empty(self) -> bool:
        """Say whether nothing was ever stored."""
        return not self.table

    @property
    def capacity(self) -> int:
        """Return the allocated slots per row and head."""
        return self.table[KEY].shape[2]

    @property
    def extent(self) -> int:
        """Return the slots in use by the fullest row."""
        return max(self.used)

    def view(self, name: str) -> Tensor:
        """Return the used part of one tensor, [B, K, extent, ...]."""
        return self.table[name][:, :, : self.extent]

    @property
    def in_use(self) -> dict[str, Tensor]:
        """Return the used part of every tensor, [B, K, extent, ...]."""
        return {name: self.view(name) for name in self.table}

    def slot_state(self, row: int | None = None) -> dict[str, Tensor]:
        """Return the policy's per-entry tensors, used part only, of one row or of all."""
        names = [name for name in self.table if name not in (KEY, VALUE, POSITION)]
        if row is None:
            return {name: self.view(name) for name in names}
        return {name: self.table[name][row : row + 1, :, : self.used[row]] for name in names}

    def fill(self, groups: Sequence[RowGroup]) -> None:
        """Replace all entries; what is not in ``groups`` is freed with the old tensors."""
        counts = {row: group.length for group in groups for row in group.rows}
        self.used = [counts[row] for row in range(len(counts))]
        self.live = list(self.used)
        self.released, self.holes, self._ordered = None, [False] * len(self.used), True
        columns: dict[str, list[tuple[RowGroup, Tensor]]] = {}
        for group in groups:
            named = {KEY: group.keys, VALUE: group.values, POSITION: group.positions.int()}
            for name, tensor in {**named, **group.slot_state}.items():
                columns.setdefault(name, []).append((group, tensor))
        alone = len(groups) == 1
        self.table = {
            name: _own(parts[0][1]) if alone else self._stack(name, parts)
            for name, parts in columns.items()
        }

    def _stack(self, name: str, parts: list[tuple[RowGroup, Tensor]]) -> Tensor:
        """Stand rows of unequal length side by side; rows without this state get zeros."""
        first = parts[0][1]
        shape = (len(self.used), first.shape[1], max(self.used), *first.shape[3:])
        stacked = first.new_full(shape, -1 if name == POSITION else 0)
        for group, tensor in parts:
            for i, row in enumerate(group.rows):
                stacked[row, :, : group.length] = tensor[i]
        return stacked

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` entries per row and head."""
        for name, old in self.table.items():
            if old.shape[2] < slots:
                shape = (*old.shape[:2], slots, *old.shape[3:])
                grown = old.new_full(shape, -1 if name == POSITION else 0)
                grown[:, :, : old.shape[2]] = old
                self.table[name] = grown

    def start(self, key: Tensor, value: Tensor, slots: int) -> None:
        """Allocate empty slots for a prompt that arrives in several forwards."""
        batch, heads, _, _ = key.shape
        self.used, self.live = [0] * batch, [0] * batch
        self.released, self.holes, self._ordered = None, [False] * batch, True
        self.table = {
            KEY: key.new_zeros(batch, heads, slots, key.shape[-1]),
            VALUE: value.new_zeros(batch, heads, slots, value.shape[-1]),
            POSITION: key.new_full((batch, heads, slots), -1, dtype=torch.int32),
        }

    def extend(self, layout: BatchLayout, key: Tensor, value: Tensor, starts: list[int]) -> None:
        """Append a forward's real tokens behind each row's entries."""
        if not self._ordered:
            self._close_holes()
        ends = [used + new for used, new in zip(self.used, layout.new_tokens, strict=True)]
        self.reserve(max(ends))
        if layout.spans is None and len(set(self.used)) == 1 and len(set(starts)) == 1:
            self._write(slice(None), self.used[0], key, value, starts[0])
        else:
            for span, start in zip(layout.row_spans, starts, strict=True):
                rows = slice(span.row, span.row + 1)
                self._write(rows, self.used[span.row], span.take(key), span.take(value), start)
        self.used, self.live = ends, list(ends)

    def _write(self, rows: slice, at: int, key: Tensor, value: Tensor, position: int) -> None:
        span = slice(at, at + key.shape[2])
        self.table[KEY][rows, :, span] = key
        self.table[VALUE][rows, :, span] = value
        if key.shape[2] == 1:
            self.table[POSITION][rows, :, span] = position
        else:
            self.table[POSITION][rows, :, span] = torch.arange(
                position, position + key.shape[2], device=key.device, dtype=torch.int32
            )
        for name in self.table.keys() - {KEY, VALUE, POSITION}:
            self.table[name][rows, :, span] = 0

    def append_step(self, key: Tensor, value: Tensor, positions: list[int], capacity: int) -> None:
        """Append one token per row: one slice when the rows are even, a scatter otherwise."""
        self.reserve(capacity)
        even = len(set(self.used)) == 1 and len(set(positions)) == 1 and not any(self.holes)
        if even:
            self._write(slice(None), self.used[0], key, value, positions[0])
        else:
            position = torch.tensor(positions, dtype=torch.int32, device=key.device)
            self._scatter(self._cursor(key), {KEY: key, VALUE: value}, position)
        for row, hole in enumerate(self.holes):
            self.used[row] += not hole
            self.live[row] += 1
        self.holes = [False] * len(self.used)

    def _cursor(self, key: Tensor) -> Tensor:
        """Return the slot each row and head writes next, int64 [B, K]."""
        if self.released is not None and all(self.holes):
            return self.released
        end = torch.tensor(self.used, device=key.device)[:, None].expand(-1, key.shape[1])
        if self.released is None or not any(self.holes):
            return end
        hole = torch.tensor(self.holes, device=key.device)[:, None]
        return torch.where(hole, self.released, end)

    def _scatter(self, cursor: Tensor, new: dict[str, Tensor], position: Tensor) -> None:
        new[POSITION] = position[:, None, None].expand(*cursor.shape, 1)
        for name, tensor in self.table.items():
            source = new.get(name)
            if source is None:  # a new entry starts with a zero state
                source = tensor.new_zeros(*cursor.shape, 1, *tensor.shape[3:])
            index = cursor.view(*cursor.shape, 1, *[1] * (tensor.dim() - 3)).expand_as(source)
            tensor.scatter_(2, index, source)

    def attend_step(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Attend over the slots in place; positions are looked at only when some slot is empty."""
        extent = self.extent
        full = all(live == extent for live in self.live)
        position = None if full else self.view(POSITION)
        return attend_filled(query, self.view(KEY), self.view(VALUE), params, position=position)

    def put_state(self, states: dict[str, Tensor], row: int | None = None) -> None:
        """Write the policy's per-entry tensors of the used slots, of one row or of all."""
        rows = slice(None) if row is None else slice(row, row + 1)
        for name, state in states.items():
            if name not in self.table:
                shape = (*self.table[POSITION].shape, *state.shape[3:])
                self.table[name] = state.new_zeros(shape)
            self.table[name][rows, :, : state.shape[2]] = state

    def release(self, slot: Tensor, over: list[bool]) -> None:
        """Mark the slot empty in the rows that are ``over``."""
        self.empty_slots(slot, None if all(over) else torch.tensor(over, device=slot.device))
        self.released, self.holes = slot, list(over)
        self._ordered = self._ordered and not any(over)
        for row, gone in enumerate(over):
            self.live[row] -= gone

    def empty_slots(self, slot: Tensor, over: Tensor | None) -> None:
        """Take the position out of a slot int64 [B, K], in the rows of ``over`` (all when None)."""
        index, emptied = slot[..., None], self.table[POSITION].new_full((1, 1, 1), -1)
        emptied = emptied.expand_as(index)
        if over is not None:
            emptied = torch.where(
                over[:, None, None], emptied, self.table[POSITION].gather(2, index)
            )
        self.table[POSITION].scatter_(2, index, emptied)

    def advance(self, slots: list[int] | None) -> None:
        """Count a step that ran on the device; rows above ``slots`` (None: no row) gave one up."""
        over = [False] * len(self.used)
        if slots is not None:
            over = [live >= most for live, most in zip(self.live, slots, strict=True)]
        self.used = [used + (not hole) for used, hole in zip(self.used, self.holes, strict=True)]
        self.live = [live + (not gone) for live, gone in zip(self.live, over, strict=True)]
        self.holes, self._ordered = over, self._ordered and not any(over)

    def rewrite_keys(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of some slots: int64 [B, K, R], [B, K, R, D]."""
        index = slots[..., None].expand_as(keys)
        self.table[KEY].scatter_(2, index, keys)

    def row(self, index: int) -> RowGroup:
        """Return one row's live entries in the order of their positions, as views."""
        if not self._ordered:
            self._close_holes()
        part = {
            name: tensor[index : index + 1, :, : self.used[index]]
            for name, tensor in self.table.items()
        }
        state = {name: part[name] for name in part if name not in (KEY, VALUE, POSITION)}
        return RowGroup((index,), part[KEY], part[VALUE], part[POSITION].long(), state)

    def _close_holes(self) -> None:
        """Sort every row by position so that empty slots come last and order means time again."""
        position = self.table[POSITION]
        order = position.long().masked_fill(position < 0, torch.iinfo(torch.int64).max)
        index = order.sort(dim=2, stable=True).indices
        for name, tensor in self.table.items():
            expanded = index.view(*index.shape, *[1] * (tensor.dim() - 3)).expand_as(tensor)
            self.table[name] = tensor.gather(2, expanded)
        self.used = list(self.live)
        self.released, self.holes, self._ordered = None, [False] * len(self.used), True

    @property
    def even(self) -> bool:
        """Say whether all rows use their slots alike."""
        return len(set(zip(self.used, self.live, self.holes, strict=True))) == 1

    def select_rows(self, index: Tensor, order: list[int]) -> None:
        """Reorder, repeat or drop rows of every tensor alike."""
        self.used = [self.used[row] for row in order]
        self.live = [self.live[row] for row in order]
        self.holes = [self.holes[row] for row in order]
        for name, tensor in self.table.items():
            self.table[name] = tensor.index_select(0, index.to(tensor.device))
        if self.released is not None:
            self.released = self.released.index_select(0, index.to(self.released.device))

    def kept_positions(self) -> Tensor:
        """Return the live positions, ascending, −1 for empty slots."""
        position = self.view(POSITION).long()
        order = position.masked_fill(position < 0, torch.iinfo(torch.int64).max)
        return position.gather(2, order.sort(dim=2).indices)[:, :, : max(self.live)]

    def tensors(self) -> dict[str, Tensor]:
        """Return every allocated tensor by name."""
        return dict(self.table)

    @property
    def nbytes(self) -> int:
        """Return the allocated bytes of keys and values, slack included."""
        return sum(self.table[name].untyped_storage().nbytes() for name in (KEY, VALUE))

    @property
    def state_nbytes(self) -> int:
        """Return the allocated bytes of everything else."""
        others = [tensor for name, tensor in self.table.items() if name not in (KEY, VALUE)]
        return sum(tensor.untyped_storage().nbytes() for tensor in others)


def _own(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that owns its bytes; a view would keep its source alive."""
    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return (
        tensor
        if exact and tensor.is_contiguous()
        else tensor.clone(memory_format=torch.contiguous_format)
    )
