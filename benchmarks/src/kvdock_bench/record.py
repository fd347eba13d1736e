"""One generated answer: what was asked, what came back, how long it took, what it held."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvdock_bench.plain_json import read_json

_LARGEST = 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_int(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_number(value: object) -> bool:
    return (type(value) is float and abs(value) < _LARGEST) or _is_int(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": _is_int,
    "float": _is_number,
    "str | None": lambda value: value is None or _is_text(value),
    "int | None": lambda value: value is None or _is_int(value),
    "float | None": lambda value: value is None or _is_number(value),
    "list[str]": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "dict[str, Any]": lambda value: isinstance(value, dict),
}
"""Tells by a field's annotation whether a value fits; a report adds numbers up, so they end."""

OOM = "oom"
UNFIT = "does not fit"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds; a batch's rows share prefill and steps, and split `generate_s` evenly.

    Args:
        prefill_s: until the prompt's scores are there.
        ttft_s: until the first token is chosen; equal to prefill_s but for the choice itself.
        decode_s: from then to the end.
        tpot_s: decode_s per decode step of the batch; None without a second token.
        generate_s: this row's share of the batch's wall time; their sum is the reasoning time.
    """

    prefill_s: float
    ttft_s: float
    decode_s: float
    tpot_s: float | None
    generate_s: float


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes per row; the peak is that of all the model's GPUs, None on CPU, which measures none.

    Args:
        kv_bytes: keys and values held after prefill, as allocated.
        kv_full_bytes: what a full cache holds for this prompt.
    """

    peak_alloc_bytes: int | None
    kv_bytes: int
    kv_full_bytes: int
    kv_ratio: float


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a prediction file; without timings and memory where `error` is set.

    Args:
        protocol: how the answer was asked for, see `make_protocol`; empty in files of version 1.
        protocol_id: equal for answers that compare.
        meta: what the task says about the sample, such as `depths` (shares of the haystack).
    """

    key: str
    method_id: str
    method: str
    task: str
    length: int
    index: int
    seed: int
    prompt_sha: str
    n_prompt_tokens: int
    units: int
    references: list[str]
    data_source: str
    device: str
    batch_size: int
    prediction: str | None = None
    score: float | None = None
    n_new_tokens: int | None = None
    finish_reason: str | None = None
    timings: Timings | None = None
    memory: MemoryUse | None = None
    error: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    protocol_id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 2

    @property
    def finished(self) -> bool:
        """Tell whether a resumed run may skip this one: an unexpected error is tried again."""
        return self.error in (None, OOM, UNFIT)

    def to_line(self) -> bytes:
        """Return the record as one line of JSON."""
        text = json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Read a line; raises ValueError when it is not a record."""
        content = read_json(line)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        try:
            timings, memory = content.pop("timings"), content.pop("memory")
            record = cls(
                **content,
                timings=Timings(**timings) if timings else None,
                memory=MemoryUse(**memory) if memory else None,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a prediction record ({error})") from error
        record._check()
        return record

    def _check(self) -> None:
        for part in (self, self.timings, self.memory):
            for item in fields(part) if part is not None else ():
                fits = _KINDS.get(str(item.type))
                if fits is not None and not fits(getattr(part, item.name)):
                    raise ValueError(f"{item.name} is not {item.type}")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError("score is not between 0 and 1")
        depths = self.meta.get("depths", [self.meta.get("depth", 0)])
        if not isinstance(depths, list) or not all(_is_number(n) and 0 <= n <= 1 for n in depths):
            raise ValueError("meta.depths are not shares between 0 and 1")
        if not _is_number(self.meta.get("nll", 0)):
            raise ValueError("meta.nll is not a number")
