"""Errors of the benchmark, printed by the CLI as one clean message."""

import difflib
from collections.abc import Iterable

from kvdock.errors import KVDockError


class BenchError(KVDockError):
    """Tell the user which file, key and value is wrong and what to write instead."""


class WorkerLost(BenchError):
    """Say that a process cannot go on computing and has to be replaced."""


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """Return a hint that names the nearest allowed spelling and lists all of them."""
    names = list(allowed)
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), list(lower), n=1, cutoff=0.5)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return f"{hint} Allowed: {', '.join(names)}."
