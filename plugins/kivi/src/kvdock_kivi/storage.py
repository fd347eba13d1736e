"""One layer's keys and values in KIVI's form.

Shapes: B rows, K key/value heads, H query heads, Q queries, N tokens, D head_dim, D' kept key
channels, R residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvdock.policy import AttentionParams
from kvdock.storage import PolicyStorage, RowGroup
from kvdock_kivi import attention, writing
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed
from kvdock_kivi.steps import KiviSteps


class KiviStorage(PolicyStorage):
    """Pack keys in whole windows of R tokens and values one token at a time.

    The newest R values and the keys since the last whole window stay as they are. A token that
    completes a window is attended to in full precision once, then the window is packed.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.live: list[int] = []
        self.channels: Tensor | None = None
        self._cache: Packed | None = None
        self._positions: Tensor | None = None
        self._counts: Tensor | None = None
        self._capacity = 0
        self._held = 0
        """1 between a step and its attention: a window that it completed waits."""

    @property
    def empty(self) -> bool:
        """Say whether nothing was ever stored."""
        return self._cache is None

    @property
    def cache(self) -> Packed:
        """Return the packed tensors."""
        assert self._cache is not None
        return self._cache

    def fill(self, groups: Sequence[RowGroup], capacity: int, *, ordered: bool) -> None:
        """Pack the first prompt's kept entries."""
        keys, values = groups[0].keys, groups[0].values
        lead = (sum(len(group.rows) for group in groups), keys.shape[1])
        channels = groups[0].channels
        if channels is not None:
            self.channels = channels.new_zeros(*lead, channels.shape[-1])
            for group in groups:
                assert group.channels is not None
                self.channels[list(group.rows)] = group.channels
        key_dim = keys.shape[-1] if channels is None else channels.shape[-1]
        dims = (keys.shape[-1], key_dim, values.shape[-1])
        self._cache = Packed.empty(self.geometry, lead, capacity, dims, keys)
        if not ordered:
            shape = (*lead, capacity)
            self._positions = torch.full(shape, -1, dtype=torch.int32, device=keys.device)
        self._capacity, self.live = capacity, [0] * lead[0]
        self._extend(groups)

    def append(self, groups: Sequence[RowGroup], capacity: int) -> None:
        """Put a later prompt's entries behind the old ones."""
        self._flush()
        self._reserve(capacity)
        self._extend(groups)

    def _extend(self, groups: Sequence[RowGroup]) -> None:
        for group in groups:
            for part, index in self._alike(group.rows):
                start, keys, values = self.live[part.start], group.keys[index], group.values[index]
                if group.length:
                    writing.extend(
                        self.cache, self.geometry, part, keys, values, start, self.channels
                    )
                if self._positions is not None:
                    span = slice(start, start + group.length)
                    self._positions[part, :, span] = group.positions[index].int()
            for row in group.rows:
                self.live[row] += group.length
        self._counts = None

    @property
    def _lengths(self) -> Tensor:
        """Return ``live`` on the device, int32 [B]."""
        if self._counts is None:
            device = self.cache.key_codes.device
            self._counts = torch.tensor(self.live, dtype=torch.int32, device=device)
        return self._counts

    def _alike(self, rows: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """Yield runs of neighbouring rows of one length, and their places in ``rows``."""
        start = 0
        for i in range(1, len(rows) + 1):
            last = i == len(rows)
            if last or rows[i] != rows[i - 1] + 1 or self.live[rows[i]] != self.live[rows[start]]:
                yield slice(rows[start], rows[i - 1] + 1), slice(start, i)
                start = i

    def _reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        self._capacity = capacity
        self._cache = self.cache.grown(self.geometry, capacity)
        old = self._positions
        if old is not None and old.shape[2] < capacity:
            self._positions = old.new_full((*old.shape[:2], capacity), -1)
            self._positions[:, :, : old.shape[2]] = old

    def append_step(self, key: Tensor, value: Tensor, positions: list[int], capacity: int) -> None:
        """Append one token per row; the value that leaves the newest R is packed."""
        self._flush()
        self._reserve(capacity)
        if self._positions is not None:
            self._put_positions(positions)
        parts = ((part, self.live[part.start]) for part, _ in self._alike(range(len(self.live))))
        writing.append_token(self.cache, self.geometry, key, value, parts, self._lengths)
        self._lengths.add_(1)
        self.live = [n + 1 for n in self.live]
        self._held = 1

    def freeze(self, capacity: int) -> KiviSteps:
        """Make room and return steps over the packed tensors as they are then."""
        self._flush()
        self._reserve(capacity)
        return KiviSteps(self.cache, self.geometry, self.channels, self._positions, self._capacity)

    def advance(self) -> None:
        """Count a step of `freeze` on the host; it packed what had to be packed."""
        self.live, self._counts = [n + 1 for n in self.live], None

    def _put_positions(self, positions: list[int]) -> None:
        assert self._positions is not None
        table = self._positions
        new = torch.tensor(positions, dtype=torch.int32, device=table.device)
        slot = self._lengths.long()[:, None, None].expand(-1, table.shape[1], 1)
        table.scatter_(2, slot, new[:, None, None].expand_as(slot))

    def _flush(self) -> None:
        """Pack the windows of keys that the last step completed."""
        if not self._held:
            return
        self._held = 0
        for part, _ in self._alike(range(len(self.live))):
            length = self.live[part.start]
            if length % self.geometry.residual == 0:
                writing.flush_keys(self.cache, self.geometry, part, length, self.channels)

    def attend_step(self, query: Tensor, params: AttentionParams) -> Tensor:
        """Attend with one query per row; then pack the window it completed, if any."""
        rows = range(len(self.live))
        output, _ = self._attend(query, rows, params, query.dtype)
        self._flush()
        return output.to(query.dtype).transpose(1, 2)

    def attend_past(
        self, query: Tensor, rows: Sequence[int], params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Attend with many later queries over all entries of some rows, without a mask."""
        self._flush()
        return self._attend(query, rows, params, torch.float32)

    def _attend(
        self, query: Tensor, rows: Sequence[int], params: AttentionParams, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        narrow = self._narrow(query, rows)
        longest = max(self.live[row] for row in rows)
        kernels = attention.kernel_for(query)
        if kernels is not None:
            result: tuple[Tensor, Tensor] = kernels.attend(
                self.cache, self.geometry, query, narrow, self._index(rows), self._lengths,
                longest, params.scaling, held=self._held, dtype=dtype,
            )  # fmt: skip
            return result
        parts = []
        for part, index in self._alike(rows):
            states = (query[index], narrow[index], part, self.live[part.start], params.scaling)
            parts.append(
                attention.reference_attend(self.cache, self.geometry, *states, held=self._held)
            )
        output, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return output, lse

    def _index(self, rows: Sequence[int]) -> Tensor:
        if list(rows) == list(range(len(self.live))):
            return torch.arange(len(self.live), dtype=torch.int32, device=self._lengths.device)
        return torch.tensor(list(rows), dtype=torch.int32, device=self._lengths.device)

    def _narrow(self, query: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the channels of the queries whose keys are packed, [b, H, Q, D']."""
        if self.channels is None:
            return query
        chosen = self.channels
        if list(rows) != list(range(len(self.live))):
            chosen = chosen[list(rows)]
        group = query.shape[1] // chosen.shape[1]
        return writing.narrowed(query, chosen.repeat_interleave(group, dim=1))

    def row(self, index: int) -> RowGroup:
        """Return one row's entries in the model's dtype; keys are 0 in channels that were cut."""
        self._flush()
        part, length = slice(index, index + 1), self.live[index]
        packed = self.geometry.key_tokens(length)
        keys, values = [], []
        for key, value, narrow in attention.tiles(self.cache, self.geometry, part, length, packed):
            if narrow and self.channels is not None:
                full = key.new_zeros(*key.shape[:3], self.cache.key_rest.shape[-1])
                chosen = self.channels[part][:, :, None, :].expand_as(key)
                key = full.scatter_(-1, chosen, key)
            keys.append(key.to(self.cache.key_rest.dtype))
            values.append(value.to(self.cache.value_rest.dtype))
        kv_heads = self.cache.key_codes.shape[1]
        keys = keys or [self.cache.key_rest[part, :, :0]]
        values = values or [self.cache.value_rest[part, :, :0]]
        if self._positions is not None:
            positions = self._positions[part, :, :length].long()
        else:
            positions = torch.arange(length, device=keys[0].device).expand(1, kv_heads, length)
        return RowGroup((index,), torch.cat(keys, dim=2), torch.cat(values, dim=2), positions)

    def select_rows(self, index: Tensor, order: list[int]) -> None:
        """Reorder, repeat or drop rows of every tensor alike."""
        self._flush()
        self._cache = self.cache.select_rows(index)
        self.live = [self.live[row] for row in order]
        if self._counts is not None:
            self._counts = self._counts.index_select(0, index.to(self._counts.device))
        if self.channels is not None:
            self.channels = self.channels.index_select(0, index.to(self.channels.device))
        if self._positions is not None:
            self._positions = self._positions.index_select(0, index.to(self._positions.device))

    @property
    def even(self) -> bool:
        """Say whether all rows hold the same number of entries."""
        return len(set(self.live)) == 1

    def kept_positions(self) -> Tensor:
        """Return int64 [B, K, C], ascending, −1 for empty slots."""
        longest = max(self.live)
        if self._positions is not None:
            return self._positions[:, :, :longest].long()
        place = torch.arange(longest, device=self._lengths.device)
        place = torch.where(place < self._lengths[:, None], place, -1)
        return place[:, None].expand(-1, self.cache.key_codes.shape[1], -1)

    def tensors(self) -> dict[str, Tensor]:
        """Return every allocated tensor by name."""
        named = self.cache.tensors() | {"lengths": self._lengths}
        if self.channels is not None:
            named["channels"] = self.channels
        if self._positions is not None:
            named["positions"] = self._positions
        return named

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales, zeros and the newest tokens."""
        return sum(x.untyped_storage().nbytes() for x in self.cache.tensors().values())

    @property
    def state_nbytes(self) -> int:
        """Return the bytes of lengths, channel indices and positions."""
        packed = self.cache.tensors()
        others = [x for name, x in self.tensors().items() if name not in packed]
        return sum(x.untyped_storage().nbytes() for x in others)
