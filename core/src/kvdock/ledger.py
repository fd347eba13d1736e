"""Count, on the host, what each row brought and what its layer must therefore hold."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from kvdock.policy import CachePolicy
from kvdock.storage import grown_capacity


@dataclass
class Ledger:
    """Keep one number per row of the batch for each fact; no device is asked.

    Args:
        tokens: real tokens seen, evicted ones included (the next position).
        turn_tokens: of them, those of the present turn's prompt.
        slots: the row's allowance in this layer.
        entries: candidates at the last compression.
        appended: tokens stored since.
        capacity: slots that must be allocated, by formula.
    """

    policy: CachePolicy | None
    tokens: list[int] = field(default_factory=list)
    turn_tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    appended: list[int] = field(default_factory=list)
    capacity: int = 0

    @property
    def live(self) -> list[int]:
        """Return the entries each row must hold, by the policy's own formula."""
        facts = zip(self.entries, self.slots, self.appended, strict=True)
        if self.policy is None:
            return [entries + more for entries, _, more in facts]
        return [self.policy.predicted_slots(entries, slots, more) for entries, slots, more in facts]

    @property
    def bounded(self) -> bool:
        """Say whether decode holds rows at their allowance."""
        return self.policy is not None and self.policy.acts_on_decode

    @property
    def limit(self) -> int | None:
        """Return the most slots a row can need during decode; None when it grows without end.

        A row held at its allowance attends over one entry more before it gives one up.
        """
        return max(self.slots) + 1 if self.bounded else None

    def begin_turn(self, batch: int) -> None:
        """Open a prompt."""
        self.tokens = self.tokens or [0] * batch
        self.turn_tokens = [0] * batch

    def bring(self, new: list[int]) -> list[int]:
        """Count a forward's real tokens; return the position of each row's first."""
        starts = self.tokens
        self.tokens = [had + more for had, more in zip(starts, new, strict=True)]
        self.turn_tokens = [had + more for had, more in zip(self.turn_tokens, new, strict=True)]
        return starts

    def compressed(self, entries: list[int]) -> None:
        """Note that the policy chose among ``entries`` candidates per row."""
        self.entries, self.appended = entries, [0] * len(entries)
        self.capacity = max(self.live)

    def kept_turn(self) -> None:
        """Note that this turn's prompt was stored as it came."""
        pairs = zip(self.appended, self.turn_tokens, strict=True)
        self.appended = [had + more for had, more in pairs]
        self.capacity = max(self.capacity, *self.live)

    def reserve(self, room: int) -> None:
        """Ask for slots for ``room`` more tokens per row, no more than decode can need."""
        need = max(self.live) + room
        limit = self.limit
        self.capacity = max(self.capacity, need if limit is None else min(need, limit))

    @property
    def room(self) -> int | None:
        """Return how many decode tokens fit into the capacity; None when any number does."""
        limit = self.limit
        if limit is not None and self.capacity >= limit:
            return None
        return self.capacity - max(self.live)

    def advance(self) -> None:
        """Count one decode token per row for which there is room already."""
        self.tokens = [n + 1 for n in self.tokens]
        self.appended = [n + 1 for n in self.appended]

    def step(self) -> None:
        """Count one decode token per row."""
        self.capacity = grown_capacity(self.capacity, max(self.live) + 1, self.limit)
        self.advance()

    def select_rows(self, order: list[int]) -> None:
        """Reorder, repeat or drop rows."""
        for item in fields(self):
            rows = getattr(self, item.name)
            if isinstance(rows, list) and rows:
                setattr(self, item.name, [rows[row] for row in order])

    @property
    def even(self) -> bool:
        """Say whether all rows have the same numbers, so that their order is immaterial."""
        lists = (getattr(self, item.name) for item in fields(self))
        return all(len(set(rows)) <= 1 for rows in lists if isinstance(rows, list))
