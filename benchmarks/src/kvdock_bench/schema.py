"""The benchmark's YAML schema: every key checked, every error with a suggestion."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    field_validator,
    model_validator,
)

from kvdock_bench.tasks import Task, get_task, get_tasks

_LENGTH = re.compile(r"([1-9][0-9]{0,8})(k?)", re.IGNORECASE)
_LONGEST = 1 << 24

Count = Annotated[StrictInt, Field(ge=1)]


def parse_length(value: object) -> int:
    """Turn 4096, "4096" or "4k" into a number of tokens."""
    if isinstance(value, int) and not isinstance(value, bool):
        tokens = value
    elif isinstance(value, str) and (match := _LENGTH.fullmatch(value.strip())):
        tokens = int(match[1]) * (1024 if match[2] else 1)
    else:
        raise ValueError("a length is a number of tokens such as 4096 or '4k'")
    if not 1 <= tokens <= _LONGEST:
        raise ValueError(f"a length lies between 1 and {_LONGEST} tokens")
    return tokens


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _lengths(value: object) -> tuple[int, ...]:
    lengths = sorted({parse_length(item) for item in _as_list(value)})
    if not lengths:
        raise ValueError("name at least one length")
    return tuple(lengths)


def _source(kinds: str) -> Any:
    def check(value: str) -> str:
        if value == kinds or (value.startswith("file:") and len(value) > len("file:")):
            return value
        raise ValueError(f"a data source is {kinds!r} or 'file:PATH'")

    return BeforeValidator(lambda v: check(v) if isinstance(v, str) else v)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Generation(_Section):
    """How answers are generated; max_new_tokens is one number, or one per task, or official."""

    max_new_tokens: Count | dict[str, Count] | None = None
    do_sample: StrictBool = False
    stop: tuple[str, ...] = ()

    @field_validator("max_new_tokens")
    @classmethod
    def _known_tasks(cls, value: object) -> object:
        if isinstance(value, dict):
            for name in value:
                get_task(name)
        return value


class DataSources(_Section):
    """Where texts come from; `qa` takes one file or several (SQuAD v2 and HotpotQA json)."""

    haystack: Annotated[str, _source("austen")] = "austen"
    qa: Annotated[tuple[Annotated[str, _source("synthetic")], ...], BeforeValidator(_as_list)] = (
        "synthetic",
    )


class BenchConfig(_Section):
    """One benchmark run: which tasks at which lengths, how prompted, how generated."""

    benchmark_name: Literal["RULER"] = "RULER"
    task_names: tuple[str, ...] = Field(default=("light",), validate_default=True)
    length: tuple[int, ...] = Field(
        default=(512, 1024, 2048), validation_alias=AliasChoices("length", "lengths")
    )
    num_samples: Count = 10
    template: str | None = "auto"
    no_template_tasks: tuple[str, ...] = ()
    answer_prefix: Literal["after_header", "in_user", "none"] = "after_header"
    question: Literal["aware"] = "aware"
    max_length: Annotated[int, Field(ge=2)] | None = None
    generation: Generation = Generation()
    batch_size: Count | Literal["auto"] = 1
    seed: StrictInt = 42
    data: DataSources = DataSources()
    task_args: dict[str, dict[str, Any]] = {}

    @field_validator("benchmark_name", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("task_names", "no_template_tasks", mode="before")
    @classmethod
    def _expand_groups(cls, value: object) -> object:
        names = [] if value is None else _as_list(value)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("write task or group names, or 'all'")
        return tuple(task.name for task in get_tasks(names))

    @field_validator("length", mode="before")
    @classmethod
    def _parse_lengths(cls, value: object) -> tuple[int, ...]:
        return _lengths(value)

    @field_validator("max_length", mode="before")
    @classmethod
    def _parse_max_length(cls, value: object) -> int | None:
        return None if value is None else parse_length(value)

    @model_validator(mode="after")
    def _check_task_args(self) -> BenchConfig:
        if not self.task_names:
            raise ValueError("task_names: name at least one task")
        for name, args in self.task_args.items():
            get_task(name).check_args(args)
        return self

    @property
    def tasks(self) -> list[Task]:
        """Return the task objects in the benchmark's order."""
        return get_tasks(self.task_names)

    def max_new_tokens(self, task: Task) -> int:
        """Return the task's generation budget: the config's, else the official one."""
        chosen = self.generation.max_new_tokens
        if isinstance(chosen, dict):
            chosen = chosen.get(task.name)
        return task.max_new_tokens if chosen is None else chosen

    def args_for(self, task: Task) -> dict[str, Any]:
        """Return the task's arguments: its defaults with the config's overrides."""
        return {**task.defaults, **self.task_args.get(task.name, {})}
