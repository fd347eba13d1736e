"""What a RULER grid consists of: its configuration, its variants, and its jobs in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdock_bench.config import BenchConfig, load_config, make_config, override
from kvdock_bench.errors import BenchError
from kvdock_bench.methods import FULL_CACHE, MethodConfig, parse_methods

FULL, RANDOM = "full", "random"
CHUNK = 10


@dataclass(frozen=True, slots=True)
class Job:
    """All tasks at one length with one method and budget."""

    number: int
    method: MethodConfig
    length: int

    @property
    def name(self) -> str:
        """Return what identifies the job for a reader."""
        budget = f" budget {self.method.budget}" if self.method.budget else ""
        return f"{self.method.label}{budget} length {self.length}"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some prompts of one task and length, made by one process for all of them."""

    task: str
    length: int
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return what identifies the prompts, as a file name too."""
        return f"{self.task}_{self.length}_{self.indices[0]}"


def chunks_of(config: BenchConfig, size: int = CHUNK) -> list[Chunk]:
    """Return the prompts of a config in chunks, longest first."""
    starts = range(0, config.num_samples, size)
    return [
        Chunk(task.name, length, tuple(range(start, min(start + size, config.num_samples))))
        for length in sorted(config.length, reverse=True)
        for task in config.tasks
        for start in starts
    ]


def grid_config(
    group: str, *, lengths: Sequence[int], samples: int, batch_size: int, seed: int | None
) -> BenchConfig:
    """Return a config for task or group names joined by commas, or for a YAML file's path."""
    if Path(group).suffix in (".yaml", ".yml"):
        config = load_config(group)
    else:
        config = make_config({"task_names": group.split(",")}, "--group")
    seed = config.seed if seed is None else seed
    return override(
        config, length=list(lengths), num_samples=samples, batch_size=batch_size, seed=seed
    )


def variant(spec: str, budget: str) -> MethodConfig:
    """Read "method", "a+b" or "method:option=value,option=value"; the text is the label.

    A method without a budget ignores it; with several methods an option is "method.option".
    """
    name, _, text = spec.partition(":")
    if name == FULL:
        if text:
            raise BenchError(f"--methods {spec!r}: the full cache has no options.")
        return dataclasses.replace(FULL_CACHE, label=FULL)
    prefix = "" if "+" in name else f"{name}."
    settings = [prefix + item for item in _split(spec, text)]
    return dataclasses.replace(parse_methods([name], [budget], settings)[1], label=spec)


def _split(spec: str, text: str) -> list[str]:
    """Split at commas; a part without "=" belongs to the list before it."""
    items: list[str] = []
    for part in filter(None, text.split(",")):
        if "=" in part:
            items.append(part)
        elif items:
            items[-1] += f",{part}"
        else:
            raise BenchError(f"--methods {spec!r}: expected option=value after the colon.")
    return items


def variants(specs: Sequence[str], budgets: Sequence[str]) -> list[MethodConfig]:
    """Return every configuration once: methods without a budget are not repeated."""
    found: dict[str, MethodConfig] = {}
    for spec in specs:
        for budget in budgets:
            method = variant(spec, budget)
            found.setdefault(method.method_id, method)
    return list(found.values())


def check_dtype(methods: Sequence[MethodConfig], dtype: str) -> None:
    """Refuse a dtype that a method does not support, before any process starts."""
    for method in methods:
        if not method.is_full and dtype not in method.dtypes:
            raise BenchError(
                f"{method.label} does not support --dtype {dtype}, only "
                f"{', '.join(method.dtypes) or 'none'}."
            )


def plan_jobs(methods: Sequence[MethodConfig], lengths: Sequence[int]) -> list[Job]:
    """Return the jobs, longest first; at each length the baselines come first.

    Without padding a batch holds few prompts, so such jobs take long and start early.
    """
    pairs = [(method, length) for length in set(lengths) for method in methods]
    places = {method.method_id: place for place, method in enumerate(methods)}

    def order(pair: tuple[MethodConfig, int]) -> tuple[int, bool, bool, int]:
        method, length = pair
        baseline = method.is_full or method.ids == (RANDOM,)
        return -length, not baseline, method.supports_padding, places[method.method_id]

    return [Job(number, *pair) for number, pair in enumerate(sorted(pairs, key=order))]
