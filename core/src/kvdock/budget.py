"""Budgets: how much of the cache may stay, as slots, as a share of the prompt, or as bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import overload

from kvdock.errors import BudgetError, shown

FORMS = (
    "2048 or '2048tok' (slots per layer and KV head), '25%' (of the prompt), "
    "'512MiB' or '1GiB' (whole cache)"
)
_PATTERN = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z%]*)")
_BYTES = {
    "b": 1,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_LARGEST = 2**63 - 1
_TOKENS = ("", "tok", "token", "tokens")
_SPELLING = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one layer may keep, made by `Budget.parse`.

    Args:
        kind: "tokens", "share" or "bytes".
        amount: slots, a share between 0 and 1, or bytes; exact.
    """

    kind: str
    amount: Fraction

    @overload
    @classmethod
    def parse(cls, value: int | str | Budget) -> Budget: ...
    @overload
    @classmethod
    def parse(cls, value: None) -> None: ...
    @classmethod
    def parse(cls, value: int | str | Budget | None) -> Budget | None:
        """Read a budget; None stays None and means the method's own default."""
        if value is None or isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise _refusal(value, "it is neither a whole number nor a text")
        if isinstance(value, int):
            if value < 1:
                raise _refusal(value, "it must be at least 1 slot")
            if value > _LARGEST:
                raise _refusal(value, "no cache is that large")
            return cls("tokens", Fraction(value))
        return cls._read(value)

    @classmethod
    def _read(cls, text: str) -> Budget:
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise _refusal(text, "it is not a positive number with an optional unit")
        amount, unit = Fraction(match[1]), match[2].lower()
        if unit in _TOKENS:
            if amount < 1 or amount.denominator != 1:
                raise _refusal(text, "slots are whole and at least 1")
            if amount > _LARGEST:
                raise _refusal(text, "no cache is that large")
            return cls("tokens", amount)
        if unit == "%":
            if not 0 < amount <= 100:
                raise _refusal(text, "a share is above 0% and at most 100%")
            return cls("share", amount / 100)
        if unit in _BYTES:
            size = amount * _BYTES[unit]
            if size < 1:
                raise _refusal(text, "it is less than one byte")
            if size > _LARGEST:
                raise _refusal(text, "no cache is that large")
            return cls("bytes", Fraction(int(size)))
        raise _refusal(text, f"the unit {match[2]!r} is unknown")

    def slots(self, length: int, *, slot_bytes: int) -> int:
        """Return the slots per layer and KV head for a prompt of `length` tokens, at least 1.

        Args:
            slot_bytes: bytes that one slot takes over all layers, KV heads and rows of the batch.
        """
        if self.kind == "share":
            return max(1, int(length * self.amount))
        if self.kind == "bytes":
            if slot_bytes < 1:
                raise ValueError(f"slot_bytes is {slot_bytes}, expected at least 1.")
            return max(1, int(self.amount / slot_bytes))
        return int(self.amount)

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{_decimal(self.amount * 100)}%"
        if self.kind == "bytes":
            unit, size = next(
                (unit, size) for unit, size in _SPELLING.items() if self.amount % size == 0
            )
            return f"{int(self.amount / size)}{unit}"
        return f"{int(self.amount)}tok"


def _decimal(value: Fraction) -> str:
    """Write a fraction digit for digit; one without an end, which is never parsed, is rounded."""
    digits = next((n for n in range(64) if (value * 10**n).denominator == 1), None)
    if digits is None:
        return str(float(value))
    whole, rest = divmod(int(value * 10**digits), 10**digits)
    return f"{whole}.{rest:0{digits}d}" if digits else str(whole)


def _refusal(value: object, reason: str) -> BudgetError:
    return BudgetError(f"budget {shown(value)}: {reason}. Accepted: {FORMS}.")
