"""Check a run.json before a report or a resumed run relies on what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainValidator, StrictInt, ValidationError

from kvdock_bench.errors import BenchError
from kvdock_bench.folder import RUN_FILE

_MOST = 2**31 - 1


def _text(value: object) -> object:
    # pydantic's own texts refuse the half characters of a command line that is not UTF-8
    if not isinstance(value, str):
        raise ValueError("expected a text")
    return value


Text = Annotated[str, PlainValidator(_text)]
Count = Annotated[StrictInt, Field(ge=0, le=_MOST)]


class _Config(BaseModel):
    benchmark_name: Text
    task_names: list[Text] = Field(min_length=1)
    length: list[Count] = Field(min_length=1)
    num_samples: Count
    seed: StrictInt
    answer_prefix: Text
    no_template_tasks: list[Text] = []
    generation: dict[Text, Any] = {}


class _Method(BaseModel):
    label: Text
    method_id: Text
    methods: list[Text]
    budget: Text | None
    options: dict[Text, dict[Text, Any]]
    server: Text = "transformers"


class _Model(BaseModel):
    name: Text
    fingerprint: Text
    dtype: Text | None = None
    attention: Text | None = None


class _Hardware(BaseModel):
    device: Text


class _Git(BaseModel):
    sha: Text


class _Engine(BaseModel):
    versions: dict[Text, Text] = {}


class _Identity(BaseModel):
    template: Text


class _Run(BaseModel):
    """What a report reads."""

    status: Text
    command: Text
    started: Text
    ended: Text | None = None
    config: _Config
    counts: dict[Text, Count] = {}
    methods: list[_Method] = []
    identity: _Identity
    model: _Model
    versions: dict[Text, Text | None]
    hardware: _Hardware
    git: _Git | None = None
    vllm: _Engine | None = None


class _Session(BaseModel):
    started: Text


class _OwnIdentity(_Identity):
    model: Text
    data: dict[Text, Any]


class _OwnRun(_Run):
    """What a resumed run reads beside that."""

    sessions: list[_Session] = Field(min_length=1)
    identity: _OwnIdentity


def check_info(folder: Path, info: dict[str, Any], *, resumed: bool = False) -> None:
    """Raise a BenchError that names the file and the key unless this describes a run."""
    try:
        (_OwnRun if resumed else _Run).model_validate(info)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise BenchError(
            f"{folder / RUN_FILE} does not describe a run of this version ({key}: {reason})."
        ) from error
