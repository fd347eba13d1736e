"""Find a suite by name: built in, or an entry point of another package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.tasks.longbench import LONGBENCH
from kvdock_bench.tasks.needle import NIAH
from kvdock_bench.tasks.registry import RULER
from kvdock_bench.tasks.suite import Suite
from kvdock_bench.tasks.text import TEXT

SUITE_GROUP = "kvdock.tasks"
"""Entry points of suites: the name is the suite's, the value a `Suite` or what returns one."""

_BUILT_IN = {suite.name: suite for suite in (RULER, NIAH, LONGBENCH, TEXT)}


def suite_names() -> list[str]:
    """Return the names of all suites, without importing any."""
    return [*_BUILT_IN, *sorted(_installed())]


def get_suite(name: str) -> Suite:
    """Return the suite of this name in any case, importing the package that brings it."""
    known = {known.lower(): known for known in suite_names()}
    found = known.get(name.lower())
    if found is None:
        raise BenchError(f"Unknown benchmark {name!r}.{did_you_mean(name, known.values())}")
    return _BUILT_IN[found] if found in _BUILT_IN else _load(found, _installed()[found])


def _installed() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in _entries():
        found.setdefault(entry.name, []).append(entry)
    return found


@cache
def _entries() -> tuple[EntryPoint, ...]:
    """Read the entry points once; a run asks for its suite with every batch."""
    return tuple(entry_points(group=SUITE_GROUP))


def _load(name: str, claims: list[EntryPoint]) -> Suite:
    origins = [_origin(claim) for claim in claims]
    if len(claims) > 1 or name.lower() in map(str.lower, _BUILT_IN):
        raise BenchError(
            f"The benchmark {name!r} is claimed by {' and '.join(sorted(origins))}"
            f"{'' if len(claims) > 1 else ' and by kvdock-bench'}. Uninstall all but one."
        )
    try:
        loaded = claims[0].load()
        suite = loaded() if callable(loaded) else loaded
    except Exception as error:
        raise BenchError(
            f"The benchmark {name!r} of {origins[0]} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(suite, Suite) or not suite.tasks:
        raise BenchError(
            f"The benchmark {name!r} of {origins[0]}: {claims[0].value} is {type(suite).__name__}, "
            "expected a kvdock_bench.tasks.Suite with at least one task, or what returns one."
        )
    return suite


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
