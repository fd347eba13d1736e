"""The task contract: a sample, its key, and what a task must offer to be fitted to a length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvdock_bench.errors import BenchError, did_you_mean

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

Args = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """Keep haystack, question and answer prefix apart, so that any protocol can use them.

    Args:
        joint: what stands between context and question in the prompt.
        likelihood: the question is a text that follows the context; its tokens are judged, and
            nothing is generated.
    """

    task: str
    index: int
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    joint: str = "\n"
    likelihood: bool = False


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Name a sample, so that the same name gives the same prompt in every process."""

    task: str
    length: int
    index: int
    seed: int

    def rng(self, purpose: str) -> random.Random:
        """Return a generator of its own for one purpose.

        Separate streams keep a needle's value the same while the fit changes the haystack's size.
        """
        text = f"{self.task}|{self.length}|{self.index}|{self.seed}|{purpose}"
        return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


class Task(Protocol):
    """A family of samples that grows with a number of units (words, lines, documents)."""

    @property
    def name(self) -> str:
        """Return the name used in configs, tables and file names."""

    @property
    def group(self) -> str:
        """Return the RULER category."""

    @property
    def metric(self) -> str:
        """Return the name of the scoring function."""

    @property
    def max_new_tokens(self) -> int:
        """Return RULER's generation budget."""

    @property
    def defaults(self) -> Args:
        """Return the arguments of the task; None stands for "by length"."""

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown or out of range."""

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Return the smallest and the largest number of units worth trying at this length."""

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Make the sample with this many units; the same key gives the same question.

        Args:
            fill: words of padding to add, for a task whose units have many tokens; each adds at
                least one token, and none of them touches the question or the answer.
        """

    def data_source(self, data: TaskData) -> str:
        """Say where the texts come from; starts with "offline substitute" where RULER's differ."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number; whole numbers only where both bounds are whole."""

    low: float
    high: float

    def holds(self, value: object) -> bool:
        """Tell whether the value is a number of the right kind within the bounds."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        whole = isinstance(self.low, int)
        return (isinstance(value, int) or not whole) and self.low <= value <= self.high


def check_args(
    task: str, args: Args, bounds: Mapping[str, Range], switches: tuple[str, ...] = ()
) -> None:
    """Check a task's arguments: known names, numbers in range, switches true or false."""
    for name, value in args.items():
        where = f"task_args: {task}.{name}"
        if name in switches:
            if not isinstance(value, bool):
                raise BenchError(f"{where} is {value!r}; expected true or false.")
        elif name not in bounds:
            allowed = [*bounds, *switches]
            hint = did_you_mean(name, allowed) if allowed else f" {task} takes no arguments."
            raise BenchError(f"{where} is unknown.{hint}")
        elif not bounds[name].holds(value):
            low, high = bounds[name].low, bounds[name].high
            raise BenchError(f"{where} is {value!r}; expected a number from {low} to {high}.")
