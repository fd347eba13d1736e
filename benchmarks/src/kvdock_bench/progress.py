"""Show how far a run is: a bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvdock_bench.tables import clock


class Reporter(Protocol):
    """What the run loop tells about its progress."""

    def advance(self, tokens: int, samples: int, label: str) -> None:
        """Count finished samples; tokens weigh them, since long prompts take longer."""

    def note(self, text: str) -> None:
        """Say something that stays visible."""


class _Bar:
    def __init__(self, bar: Progress, tokens: int, samples: int) -> None:
        self._bar = bar
        self._total, self._done = samples, 0
        self._task = bar.add_task("", total=tokens or samples, count=f"0/{samples}")

    def advance(self, tokens: int, samples: int, label: str) -> None:
        self._done += samples
        count = f"{self._done}/{self._total}"
        self._bar.update(self._task, advance=tokens or samples, description=label, count=count)

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)


class _Lines:
    """One line for each change of cell, and at least one a minute within a long cell."""

    def __init__(self, console: Console, tokens: int, samples: int) -> None:
        self._console = console
        self._tokens, self._tokens_done = tokens or samples, 0
        self._samples, self._done = samples, 0
        self._start = self._last = time.monotonic()
        self._label = ""

    def advance(self, tokens: int, samples: int, label: str) -> None:
        self._tokens_done += tokens or samples
        self._done += samples
        now = time.monotonic()
        if label == self._label and now - self._last < 60 and self._done < self._samples:
            return
        self._label, self._last = label, now
        spent = now - self._start
        left = spent / self._tokens_done * (self._tokens - self._tokens_done)
        self.note(f"{self._done}/{self._samples} samples, {label}, ETA {clock(left)}")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console, tokens: int, samples: int) -> Iterator[Reporter]:
    """Show progress for the duration of a block."""
    if not console.is_terminal:
        yield _Lines(console, tokens, samples)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # the default window of 30 s forgets that short prompts are faster than long ones
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        yield _Bar(bar, tokens, samples)
