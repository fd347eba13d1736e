"""Options of a method: a frozen dataclass whose fields carry and check range, symbol and help."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, Union

from kvdock.errors import OptionError, shown

_KEY = "kvdock.option"
_LARGEST = 2**63 - 1
_SCALARS = (bool, int, float, str)


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """What an option accepts, as given to `option()`."""

    help: str = ""
    symbol: str | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] | None = None
    multiple: bool = False

    def bounds(self) -> list[tuple[str, float]]:
        pairs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return [(sign, bound) for sign, bound in pairs if bound is not None]

    def text(self) -> str:
        """Describe the accepted values; empty when everything of the type is accepted."""
        if self.choices is not None:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        return ", ".join(f"{sign} {bound:g}" for sign, bound in self.bounds())

    def allows(self, value: Any) -> bool:
        if self.choices is not None and value not in self.choices:
            return False
        holds = {
            ">=": lambda bound: value >= bound,
            ">": lambda bound: value > bound,
            "<=": lambda bound: value <= bound,
            "<": lambda bound: value < bound,
        }
        return all(holds[sign](bound) for sign, bound in self.bounds())


class OptionRow(NamedTuple):
    """One line of a method's option table."""

    name: str
    default: Any
    range: str
    symbol: str
    help: str


def option(
    default: Any,
    *,
    help: str,
    symbol: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    multiple: bool = False,
) -> Any:
    """Declare one field of an `Options` class.

    Args:
        symbol: the paper's symbol for it, shown by `kvdock show`.
        ge, gt, le, lt: bounds of a number.
        choices: the accepted values.
        multiple: the value is a tuple; bounds and choices apply to each of its items.
    """
    if multiple and isinstance(default, list):
        default = tuple(default)
    rule = _Rule(
        help, symbol, ge, gt, le, lt, None if choices is None else tuple(choices), multiple
    )
    return dataclasses.field(default=default, metadata={_KEY: rule})


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Base of every method's options; derive with `@dataclass(frozen=True, slots=True)`."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            rule = _rule(field)
            value = _checked(field.name, getattr(self, field.name), hints[field.name], rule)
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Check what concerns several fields at once; override and raise `OptionError`."""


AnyOptions = TypeVar("AnyOptions", bound=Options)


def build(cls: type[AnyOptions], mapping: Mapping[str, Any]) -> AnyOptions:
    """Make an instance of `cls` from names and values, refusing a name it does not have."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in mapping:
        if name not in known:
            raise OptionError(_unknown(name, known))
    return cls(**mapping)


def describe(cls: type[Options]) -> list[OptionRow]:
    """List the options of `cls` in the order of their declaration."""
    rows = []
    for field in dataclasses.fields(cls):
        rule = _rule(field)
        rows.append(OptionRow(field.name, field.default, rule.text(), rule.symbol or "", rule.help))
    return rows


def _rule(field: dataclasses.Field[Any]) -> _Rule:
    rule = field.metadata.get(_KEY)
    return rule if isinstance(rule, _Rule) else _Rule()


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    listing = f"Known options: {', '.join(known)}." if known else "This method has no options."
    return f"unknown option {shown(name)}.{guess} {listing}"


def _checked(name: str, value: Any, hint: Any, rule: _Rule) -> Any:
    """Return `value` in the type of the field, or raise `OptionError`."""
    accepted = _members(hint)
    if value is None and type(None) in accepted:
        return None
    if rule.multiple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        item_types = _item_types(accepted)
        return tuple(_scalar(name, item, item_types, rule) for item in items)
    return _scalar(name, value, accepted, rule)


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _item_types(accepted: tuple[Any, ...]) -> tuple[Any, ...]:
    for hint in accepted:
        if typing.get_origin(hint) is tuple:
            return tuple(item for item in typing.get_args(hint) if item is not Ellipsis)
    return accepted


def _scalar(name: str, value: Any, accepted: tuple[Any, ...], rule: _Rule) -> Any:
    scalars = [hint for hint in accepted if hint in _SCALARS]
    # bool is an int to Python but never what is meant by a number here
    if float in scalars and type(value) is int and int not in scalars:
        value = _as_float(value)
    fits = not scalars or type(value) in scalars
    if isinstance(value, float) and not math.isfinite(value):
        fits = False
    if not fits or not rule.allows(value):
        raise OptionError(
            f"option {name!r} is {shown(value)}, expected {_expected(scalars, rule)}."
        )
    if type(value) is int and abs(value) > _LARGEST:
        # of 4300 digits and more Python writes none, and a method's own message would fail
        raise OptionError(f"option {name!r} is {shown(value)}; no option takes numbers that large.")
    return value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _expected(scalars: list[type], rule: _Rule) -> str:
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    parts = (
        [" or ".join(nouns[hint] for hint in scalars)] if scalars and rule.choices is None else []
    )
    return " ".join(part for part in (*parts, rule.text()) if part)
