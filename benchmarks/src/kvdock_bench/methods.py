"""Turn --acceleration, --budget and --set into checked method configurations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvdock import Budget
from kvdock.method import Method, canonical
from kvdock.registry import Host, default_host
from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.fingerprint import short_hash
from kvdock_bench.plain_json import read_json

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """One column of the table: methods by id, their budget and every option's value."""

    label: str
    ids: tuple[str, ...] = ()
    budget: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    supports_padding: bool = True
    dtypes: tuple[str, ...] = ()
    server: str = "transformers"

    @property
    def is_full(self) -> bool:
        """Tell whether this is the plain model with its full cache, which others compare with."""
        return not self.ids and self.server == "transformers"

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the results, for keys and run.json."""
        identity = {
            "methods": list(self.ids),
            "budget": self.budget,
            "options": {name: dict(values) for name, values in self.options.items()},
        }
        # left out where it always was, so that earlier answers keep their keys
        return identity if self.server == "transformers" else {**identity, "server": self.server}

    @property
    def method_id(self) -> str:
        """Return a folder name: ids and the hash of the whole configuration."""
        if not self.ids:
            return "full" if self.is_full else self.server
        return f"{'+'.join(self.ids)}-{short_hash(self.identity, 8)}"

    def attach_arguments(self) -> dict[str, Any]:
        """Return the arguments of `kvdock.attach` after the model."""
        alone = len(self.ids) == 1
        options = {
            name if alone else f"{method}.{name}": value
            for method, values in self.options.items()
            for name, value in values.items()
        }
        return {"methods": "+".join(self.ids), "budget": self.budget, **options}


FULL_CACHE = MethodConfig("Full cache")
VLLM = MethodConfig("vLLM", server="vllm")


def parse_methods(
    names: Sequence[str],
    budgets: Sequence[str],
    settings: Sequence[str],
    host: Host | None = None,
) -> list[MethodConfig]:
    """Return the full cache and one configuration per method and budget; checks everything."""
    host = host or default_host()
    parsed: list[str | None] = [_spelling(Budget.parse(text)) for text in budgets]
    columns = [[host.load(part) for part in name.split("+")] for name in names]
    chosen = parse_settings(settings, {method.id for column in columns for method in column})
    configs = [FULL_CACHE]
    for column, budget in itertools.product(columns, parsed or [None]):
        config = _configure(column, budget, chosen, several=len(parsed) > 1)
        # a method without a budget is one column, however many budgets there are
        if config not in configs:
            configs.append(config)
    return configs


def parse_settings(settings: Sequence[str], known: set[str]) -> Settings:
    """Read "method.option=value" texts into options by method id."""
    chosen: Settings = {}
    for text in settings:
        path, equals, value = text.partition("=")
        method, dot, option = path.strip().partition(".")
        if not (equals and dot and option):
            raise BenchError(f"--set {text!r}: expected method.option=value, as snapkv.window=16.")
        if canonical(method) not in known:
            hint = did_you_mean(canonical(method), sorted(known)) if known else " There is none."
            raise BenchError(f"--set {text!r}: {method!r} is not in --acceleration.{hint}")
        chosen.setdefault(canonical(method), {})[option] = _value(value.strip())
    return chosen


def _configure(
    column: list[Method], budget: str | None, chosen: Settings, *, several: bool
) -> MethodConfig:
    defaults = [m.default_budget for m in column if m.default_budget is not None]
    if not defaults:
        budget = None
    elif budget is None:
        budget = _spelling(Budget.parse(defaults[0]))
    options = {}
    for method in column:
        checked = method.make_options(**chosen.get(method.id, {}))
        options[method.id] = dataclasses.asdict(checked)
    label = " + ".join(method.name for method in column)
    abilities = [method.capabilities for method in column]
    return MethodConfig(
        label=f"{label} {budget}" if several and budget else label,
        ids=tuple(method.id for method in column),
        budget=budget,
        options=options,
        supports_padding=all(ability.supports_padding for ability in abilities),
        dtypes=tuple(
            name
            for name in ("float32", "float16", "bfloat16")
            if all(name in ability.dtypes for ability in abilities)
        ),
    )


def _spelling(budget: Budget) -> str:
    """Return one spelling per budget, slots as a plain number."""
    return str(budget).removesuffix("tok")


def _value(text: str) -> Any:
    """Read a number, true, false, null or a comma list of them; everything else is text."""
    if "," in text:
        return [_value(part.strip()) for part in text.split(",") if part.strip()]
    try:
        value = read_json(text)
    except ValueError:
        return text
    return text if isinstance(value, (dict, list)) else value
