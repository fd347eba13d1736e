"""Resolve what the user asked for into policies that fit together, before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from kvdock.budget import Budget
from kvdock.errors import CompositionError, OptionError
from kvdock.method import Method
from kvdock.policy import AttentionPolicy, CachePolicy
from kvdock.registry import Host

DEFAULT_BUDGET = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class Composition:
    """The policies of one attachment; at most one of each role."""

    names: tuple[str, ...]
    methods: tuple[Method, ...]
    cache_policy: CachePolicy | None
    attention_policy: AttentionPolicy | None
    budget: Budget


def compose(
    host: Host,
    methods: str | Sequence[Any],
    budget: int | str | Budget | None,
    options: dict[str, Any],
) -> Composition:
    """Load the methods, share the options out, build the policies and check that they compose."""
    parsed = Budget.parse(budget)
    asked = _split(methods)
    records = [host.load(item) if isinstance(item, str) else None for item in asked]
    loaded = [record for record in records if record is not None]
    shares = _share_options(loaded, options)
    policies = [
        host.build_policy(record, record.make_options(**shares[record.id])) if record else item
        for record, item in zip(records, asked, strict=True)
    ]
    names = tuple(
        record.id if record else type(policy).__name__
        for record, policy in zip(records, policies, strict=True)
    )
    cache = _one(CachePolicy, names, policies, "choose what the cache keeps")
    attention = _one(AttentionPolicy, names, policies, "compute the prefill's attention")
    if parsed is None:
        defaults = [record.default_budget for record in loaded if record.default_budget]
        parsed = Budget.parse(min(defaults, default=DEFAULT_BUDGET))
    if cache is not None:
        cache.check_budget(parsed)
    return Composition(names, tuple(loaded), cache, attention, parsed)


def _split(methods: str | Sequence[Any]) -> list[Any]:
    items = methods.split("+") if isinstance(methods, str) else list(methods)
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if not items or "" in items:
        raise CompositionError(
            f"methods is {methods!r}; expected an id such as 'snapkv', ids joined by '+', or a"
            " list of them."
        )
    for item in items:
        if not isinstance(item, str | CachePolicy | AttentionPolicy):
            raise CompositionError(
                f"{item!r} is neither a method id nor a configured policy (a CachePolicy or"
                " AttentionPolicy)."
            )
    return items


def _share_options(methods: list[Method], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give every option to the method that has it; ``method.option`` names it outright."""
    fields = {
        method.id: {f.name for f in dataclasses.fields(method.options_type())} for method in methods
    }
    shares: dict[str, dict[str, Any]] = {id: {} for id in fields}
    for key, value in options.items():
        owner, _, name = key.rpartition(".")
        owners = [id for id in fields if name in fields[id] and owner in ("", id)]
        if len(owners) > 1:
            both = " and ".join(f"{id}.{name}" for id in owners)
            raise OptionError(f"option {name!r} is ambiguous: write {both}.")
        if not owners:
            known = sorted({name for names in fields.values() for name in names})
            near = difflib.get_close_matches(name, known, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"unknown option {key!r}.{guess} {' + '.join(fields) or 'These policies'} take"
                f" {', '.join(known) or 'no options'}."
            )
        shares[owners[0]][name] = value
    return shares


def _one(kind: type[Any], names: Sequence[str], policies: Sequence[Any], role: str) -> Any:
    found = [
        (name, policy)
        for name, policy in zip(names, policies, strict=True)
        if isinstance(policy, kind)
    ]
    if len(found) > 1:
        raise CompositionError(
            f"{' and '.join(name for name, _ in found)} cannot be combined: both {role}. Keep one."
        )
    return found[0][1] if found else None
