"""Where each row's real tokens stand in a forward's columns; built by the mask function.

The layout replaces the attention mask. It is made once per forward and handed to every layer
untouched; its one host copy happens when the first layer asks for rows of a padded batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The columns of one row that hold real tokens in this forward.

    ``columns`` is a slice where they are contiguous (left padding), an index tensor where pads lie
    between them (a second turn on a padded batch).
    """

    row: int
    count: int
    columns: slice | Tensor

    def take(self, states: Tensor) -> Tensor:
        """Return this row's real tokens of ``states`` [B, heads, Q, D] as [1, heads, count, D]."""
        one = states[self.row : self.row + 1]
        if isinstance(self.columns, slice):
            return one[:, :, self.columns]
        return one.index_select(2, self.columns.to(states.device))

    def put(self, output: Tensor, states: Tensor) -> None:
        """Write ``states`` [1, count, heads, D] to this row's columns of [B, Q, heads, D]."""
        if isinstance(self.columns, slice):
            output[self.row, self.columns] = states[0]
        else:
            output[self.row].index_copy_(0, self.columns.to(output.device), states[0])


@dataclass(eq=False)
class BatchLayout:
    """Describe one forward: B rows of Q columns after ``seen`` earlier columns.

    Args:
        mask: bool [B, seen + Q], True where a column holds a real token; None when all do.
        batch, columns, seen: B, Q and the number of earlier columns.
        window: sliding-window length for layers that have one.
    """

    mask: Tensor | None
    batch: int
    columns: int
    seen: int
    window: int | None = None
    checked: bool = field(default=False, init=False)

    @cached_property
    def host_mask(self) -> Tensor | None:
        """Return the mask on the host, or None when every column is real; the one sync."""
        if self.mask is None:
            return None
        host = self.mask.to("cpu", dtype=torch.bool)
        return None if bool(host.all()) else host

    @cached_property
    def spans(self) -> list[RowSpan] | None:
        """Return one span per row, or None when no column of this forward is a pad."""
        host = self.host_mask
        if host is None:
            return None
        new = host[:, self.seen :]
        if bool(new.all()):
            return None
        return [_span(row, new[row]) for row in range(self.batch)]

    @cached_property
    def row_spans(self) -> list[RowSpan]:
        """Return one span per row, whether or not any column is a pad."""
        whole = slice(0, self.columns)
        return self.spans or [RowSpan(row, self.columns, whole) for row in range(self.batch)]

    @cached_property
    def new_tokens(self) -> list[int]:
        """Return how many real tokens each row brings."""
        if self.spans is None:
            return [self.columns] * self.batch
        return [span.count for span in self.spans]

    def check_past(self, lengths: list[int]) -> None:
        """Refuse a mask that says other things about cached columns than it said before."""
        if self.checked:
            return
        host = self.host_mask
        past = (
            [self.seen] * self.batch if host is None else host[:, : self.seen].sum(dim=1).tolist()
        )
        if past != lengths:
            raise UnsupportedError(
                f"the attention mask marks {past} real tokens in the columns already cached, but"
                f" the cache holds {lengths} tokens per row. Pass the mask of the whole history"
                " (earlier turns included), unchanged for the columns the cache has seen."
            )
        self.checked = True

    # What accelerate's hooks and transformers' decorators ask of anything called attention_mask.

    def to(self, *args: object, **kwargs: object) -> BatchLayout:
        """Return self: the layout is moved row by row where it is used."""
        return self

    def contiguous(self) -> BatchLayout:
        """Return self."""
        return self

    @property
    def ndim(self) -> int:
        """Return 2, the rank of the mask the layout stands for."""
        return 2

    @property
    def shape(self) -> tuple[int, int]:
        """Return (B, seen + Q)."""
        return self.batch, self.seen + self.columns


def _span(row: int, valid: Tensor) -> RowSpan:
    where = valid.nonzero().squeeze(1)
    count = int(where.numel())
    if count == 0:
        return RowSpan(row, 0, slice(0, 0))
    first, last = int(where[0]), int(where[-1])
    if last - first + 1 == count:
        return RowSpan(row, count, slice(first, last + 1))
    return RowSpan(row, count, where)
