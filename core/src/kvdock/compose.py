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
from kvdock.storage_policy import ChannelPolicy, FormatPolicy

DEFAULT_BUDGET = 2048

ROLES: dict[type[Any], str] = {
    AttentionPolicy: "compute the prefill's attention",
    CachePolicy: "choose which tokens the cache keeps",
    ChannelPolicy: "choose which key channels are stored",
    FormatPolicy: "choose the number format of the cache",
}
"""Every role with what it does, in the order in which they act on a layer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Composition:
    """The policies of one attachment, at most one of each role, in the order they act."""

    names: tuple[str, ...]
    methods: tuple[Method, ...]
    cache_policy: CachePolicy | None
    attention_policy: AttentionPolicy | None
    channel_policy: ChannelPolicy | None
    format_policy: FormatPolicy | None
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
    _check_order(names, policies)
    attention, cache, channels, form = (_one(role, names, policies) for role in ROLES)
    if cache is None and parsed is not None:
        raise CompositionError(
            f"a budget of {budget} was given, but {' + '.join(names)} keeps every token. Leave the"
            " budget out, or add a method that selects tokens, such as snapkv."
        )
    if parsed is None:
        defaults = [record.default_budget for record in loaded if record.default_budget]
        parsed = Budget.parse(min(defaults, default=DEFAULT_BUDGET))
    if cache is not None:
        cache.check_budget(parsed)
    channels = channels if channels is not None and channels.active else None
    form = form if form is not None and form.active else None
    _check_storage(names, cache, channels or form)
    return Composition(names, tuple(loaded), cache, attention, channels, form, parsed)


def _split(methods: str | Sequence[Any]) -> list[Any]:
    items = methods.split("+") if isinstance(methods, str) else list(methods)
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if not items or "" in items:
        raise CompositionError(
            f"methods is {methods!r}; expected an id such as 'snapkv', ids joined by '+', or a"
            " list of them."
        )
    for item in items:
        if not isinstance(item, (str, *ROLES)):
            kinds = ", ".join(role.__name__ for role in ROLES)
            raise CompositionError(
                f"{item!r} is neither a method id nor a configured policy ({kinds})."
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


def _one(role: type[Any], names: Sequence[str], policies: Sequence[Any]) -> Any:
    found = [
        (name, policy)
        for name, policy in zip(names, policies, strict=True)
        if isinstance(policy, role)
    ]
    if len(found) > 1:
        raise CompositionError(
            f"{' and '.join(name for name, _ in found)} cannot be combined: both {ROLES[role]}."
            " Keep one."
        )
    return found[0][1] if found else None


def _check_order(names: Sequence[str], policies: Sequence[Any]) -> None:
    """Refuse a spelling whose order is not the order in which the methods act."""
    steps = (CachePolicy, ChannelPolicy, FormatPolicy)
    acts = [
        (next(i for i, role in enumerate(steps) if isinstance(policy, role)), name)
        for name, policy in zip(names, policies, strict=True)
        if isinstance(policy, steps)
    ]
    ordered = sorted(acts, key=lambda act: act[0])
    if acts != ordered:
        raise CompositionError(
            f"{'+'.join(names)}: a cache is compressed in the order token selection, channel"
            f" pruning, quantisation. Write {'+'.join(name for _, name in ordered)!r}."
        )


def _check_storage(names: Sequence[str], cache: CachePolicy | None, storage: Any) -> None:
    """Refuse a token selection that would have to take entries out of packed storage again."""
    if cache is None or storage is None:
        return
    reasons = {
        "acts_on_decode": "gives up entries at every decode step",
        "observes_decode": "scores entries at every decode step",
        "acts_on_later_turns": "selects again at the end of a later turn",
        "revises": "shrinks earlier layers after they were stored",
    }
    found = [reason for name, reason in reasons.items() if getattr(cache, name)]
    if found:
        raise CompositionError(
            f"{'+'.join(names)} cannot be combined: the token selection {' and '.join(found)}, but"
            " packed or narrowed entries cannot be taken out one by one. Use a method that selects"
            " once, at the end of the prompt, such as snapkv, pyramidkv, l2compress or cam."
        )
