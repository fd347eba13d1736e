"""A task made of the user's own file: one JSON object a line, with a prompt and its references."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.errors import BenchError
from kvdock_bench.plain_json import read_texts
from kvdock_bench.scoring import check_answer_metric, check_references
from kvdock_bench.tasks.base import Args, Sample, SampleKey, check_args

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData

_TEXTS = ("prompt", "context", "question", "answer_prefix", "metric")


@dataclass(frozen=True, slots=True)
class JsonlTask:
    """Ask what the lines of a file ask, in their order; the prompts have their own lengths.

    A line holds `references` (texts; one alone may stand without brackets) and either `prompt` or
    `context` and `question`; `answer_prefix` and `metric` may be added.
    """

    name: str
    path: str
    metric: str
    max_new_tokens: int = 64
    group: str = "jsonl"
    defaults: ClassVar[dict[str, Any]] = {}

    def check_args(self, args: Args) -> None:
        """Raise BenchError: the task takes no arguments."""
        check_args(self.name, args, {})

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Return one size: the prompts do not grow."""
        return 1, 1

    def size(self, data: TaskData) -> int:
        """Return the number of samples; raises BenchError for one that no metric can score."""
        rows = _rows(self.path)[0]
        for number, row in enumerate(rows):
            try:
                check_references(row.get("metric", self.metric), row["references"])
            except BenchError as error:
                raise BenchError(f"{self.path}, sample {number}: {error}") from error
        return len(rows)

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Return the line of the key's index."""
        row = _rows(self.path)[0][key.index]
        return Sample(
            task=self.name,
            index=key.index,
            context=row.get("prompt", row.get("context", "")),
            question=row.get("question", ""),
            answer_prefix=row.get("answer_prefix", ""),
            references=tuple(row["references"]),
            meta={"metric": row["metric"]} if "metric" in row else {},
        )

    def data_source(self, data: TaskData) -> str:
        """Name the file."""
        return f"user file: {Path(self.path).name}"

    def digest(self, data: TaskData) -> str:
        """Return the SHA-256 of the file."""
        return _rows(self.path)[1]


def _rows(path: str) -> tuple[list[dict[str, Any]], str]:
    try:
        file = Path(path).expanduser()
        state = file.stat()
        return _parsed(file, state.st_mtime_ns, state.st_size)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise BenchError(f"jsonl: cannot read {path!r} ({reason}).") from error


@lru_cache(maxsize=16)
def _parsed(path: Path, _time: int, _size: int) -> tuple[list[dict[str, Any]], str]:
    raw = path.read_bytes()
    rows = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(_row(line))
            except (ValueError, BenchError) as error:
                raise BenchError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise BenchError(f"{path}: no line holds a sample.")
    return rows, hashlib.sha256(raw).hexdigest()


def _row(line: bytes) -> dict[str, Any]:
    content = read_texts(line.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}.")
    for name in _TEXTS:
        if not isinstance(content.get(name, ""), str):
            raise ValueError(f"{name!r} is {content[name]!r:.60}, expected a text.")
    references = content.get("references")
    if isinstance(references, str):
        references = [references]
    if not (
        isinstance(references, list)
        and references
        and all(isinstance(item, str) for item in references)
    ):
        raise ValueError(
            f"'references' is {references!r:.60}, expected a list of at least one text."
        )
    if ("prompt" in content) == ("context" in content and "question" in content):
        raise ValueError("expected either 'prompt' or both 'context' and 'question'.")
    if "metric" in content:
        check_answer_metric(content["metric"])
    return {**content, "references": references}
