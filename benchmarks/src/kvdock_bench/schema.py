"""The benchmark's YAML schema: every key checked, every error with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kvdock_bench.longbench_files import check_source
from kvdock_bench.scoring import check_answer_metric
from kvdock_bench.tasks import OWN_LENGTH, Suite, Task, get_suite, suite_names
from kvdock_bench.tasks.jsonl import JsonlTask

_LENGTH = re.compile(r"([1-9][0-9]{0,8})(k?)", re.IGNORECASE)
_LONGEST = 1 << 24
# A task names files of the run folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")

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


class DataSources(_Section):
    """Where texts come from; `qa` takes one file or several (SQuAD v2 and HotpotQA json).

    `longbench` is a folder of the task's files, or "hub@COMMIT". `compat: ruler` makes RULER's
    prompts as its own scripts do.
    """

    haystack: Annotated[str, _source("austen")] = "austen"
    qa: Annotated[tuple[Annotated[str, _source("synthetic")], ...], BeforeValidator(_as_list)] = (
        "synthetic",
    )
    longbench: Annotated[str, AfterValidator(check_source)] | None = None
    compat: Literal["native", "ruler"] = "native"


class JsonlFile(_Section):
    """A task of the user's own: a file of prompts and references, and how they are scored."""

    path: Annotated[str, Field(min_length=1)]
    metric: Annotated[str, AfterValidator(check_answer_metric)] = "string_match_all"
    max_new_tokens: Count = 64


class BenchConfig(_Section):
    """One benchmark run: which tasks at which lengths, how prompted, how generated."""

    # Validated in this order: files make the suite, the suite knows the tasks.
    jsonl: dict[str, JsonlFile] = {}
    benchmark_name: str = "RULER"
    task_names: tuple[str, ...] = Field(default=(), validate_default=True)
    length: tuple[int, ...] = Field(
        default=(), validate_default=True, validation_alias=AliasChoices("length", "lengths")
    )
    num_samples: Count = 10
    template: str | None = "auto"
    no_template_tasks: tuple[str, ...] = Field(default=(), validate_default=True)
    answer_prefix: Literal["after_header", "in_user", "none"] = "after_header"
    question: Literal["aware", "agnostic"] = "aware"
    max_length: Annotated[int, Field(ge=2)] | None = None
    generation: Generation = Generation()
    batch_size: Count | Literal["auto"] = 1
    seed: StrictInt = 42
    data: DataSources = DataSources()
    task_args: dict[str, dict[str, Any]] = {}

    @field_validator("jsonl")
    @classmethod
    def _check_names(cls, value: dict[str, JsonlFile]) -> dict[str, JsonlFile]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the task name {name!r} is not made of letters, digits, _ . -")
        return value

    @field_validator("benchmark_name")
    @classmethod
    def _known_suite(cls, value: str, info: ValidationInfo) -> str:
        if "jsonl" not in info.data:
            return value
        if not info.data["jsonl"]:
            return get_suite(value).name
        if value.lower() in map(str.lower, suite_names()):
            raise ValueError("a benchmark of own jsonl files needs a name of its own")
        return value

    @field_validator("task_names", "no_template_tasks", mode="wrap")
    @classmethod
    def _expand_groups(cls, value: object, handler: Any, info: ValidationInfo) -> object:
        suite = _suite_of(info.data)
        if suite is None:
            return ()
        if value == () or value is None:
            value = suite.default if info.field_name == "task_names" else suite.no_template
        names = _as_list(value)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("write task or group names, or 'all'")
        return handler(tuple(task.name for task in suite.select(names)))

    @field_validator("length", mode="before")
    @classmethod
    def _parse_lengths(cls, value: object, info: ValidationInfo) -> tuple[int, ...]:
        suite = _suite_of(info.data)
        if suite is None or value == ():
            return suite.lengths if suite else ()
        if suite.fitted:
            return _lengths(value)
        if _as_list(value) != [OWN_LENGTH]:
            raise ValueError(
                f"the prompts of {suite.name} have their own length; leave the key out, and cut"
                " long ones with max_length"
            )
        return (OWN_LENGTH,)

    @field_validator("max_length", mode="before")
    @classmethod
    def _parse_max_length(cls, value: object) -> int | None:
        return None if value is None else parse_length(value)

    @model_validator(mode="after")
    def _check_task_args(self) -> BenchConfig:
        if not self.task_names:
            raise ValueError("task_names: name at least one task")
        for name, args in self.task_args.items():
            self.suite.task(name).check_args(args)
        if isinstance(self.generation.max_new_tokens, dict):
            for name in self.generation.max_new_tokens:
                self.suite.task(name)
        return self

    @property
    def suite(self) -> Suite:
        """Return the suite that the name, or the jsonl files, stand for."""
        return _make_suite(self.benchmark_name, self.jsonl)

    @property
    def tasks(self) -> list[Task]:
        """Return the task objects in the benchmark's order."""
        return self.suite.select(self.task_names)

    def max_new_tokens(self, task: Task) -> int:
        """Return the task's generation budget: the config's, else the official one."""
        chosen = self.generation.max_new_tokens
        if isinstance(chosen, dict):
            chosen = chosen.get(task.name)
        return task.max_new_tokens if chosen is None else chosen

    def args_for(self, task: Task) -> dict[str, Any]:
        """Return the task's arguments: its defaults with the config's overrides."""
        return {**task.defaults, **self.task_args.get(task.name, {})}


def _make_suite(name: str, files: Mapping[str, JsonlFile]) -> Suite:
    if not files:
        return get_suite(name)
    tasks = [JsonlTask(task, f.path, f.metric, f.max_new_tokens) for task, f in files.items()]
    return Suite(name, tuple(tasks), fitted=False)


def _suite_of(data: Mapping[str, Any]) -> Suite | None:
    """Return the suite of a config being read; None when its name has been refused already."""
    if "benchmark_name" not in data or "jsonl" not in data:
        return None
    return _make_suite(data["benchmark_name"], data["jsonl"])
