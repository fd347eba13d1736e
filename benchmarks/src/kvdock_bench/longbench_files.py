"""LongBench's rows: `TASK.jsonl` files of a folder, or of the archive on the hub."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from kvdock_bench.errors import BenchError
from kvdock_bench.plain_json import read_json

_HUB = "zai-org/LongBench"
_KINDS = {"input": str, "context": str, "answers": list}


class LongBenchFiles:
    """Read files when a task first needs them.

    Args:
        source: "hub" downloads the archive, once; "file:FOLDER" reads a local folder.
    """

    def __init__(self, source: str | None) -> None:
        if source is None:
            raise BenchError(
                "LongBench's texts do not come with the package. Set data.longbench to "
                "'file:FOLDER', a folder with hotpotqa.jsonl and the others, or to 'hub' to "
                f"download {_HUB}."
            )
        self._folder = None if source == "hub" else Path(source.removeprefix("file:")).expanduser()
        self._read: dict[str, tuple[list[dict[str, Any]], str]] = {}

    @property
    def label(self) -> str:
        """Return the data source for the tables."""
        return f"hub: {_HUB}" if self._folder is None else f"user folder: {self._folder.name}"

    def rows(self, task: str) -> list[dict[str, Any]]:
        """Return the rows of a task."""
        return self._load(task)[0]

    def digest(self, task: str) -> str:
        """Return the SHA-256 of a task's file."""
        return self._load(task)[1]

    def _load(self, task: str) -> tuple[list[dict[str, Any]], str]:
        if task not in self._read:
            origin, raw = self._bytes(task)
            lines = raw.decode("utf-8").split("\n")
            rows = [
                _row(line, f"{origin}, line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
            if not rows:
                raise BenchError(f"{origin}: no line holds a sample.")
            self._read[task] = rows, hashlib.sha256(raw).hexdigest()
        return self._read[task]

    def _bytes(self, task: str) -> tuple[str, bytes]:
        if self._folder is None:
            return f"{_HUB}, {task}.jsonl", _download(task)
        path = self._folder / f"{task}.jsonl"
        try:
            return str(path), path.read_bytes()
        except OSError as error:
            raise BenchError(
                f"data.longbench: cannot read {path} ({error.strerror or error}). Put LongBench's "
                f"{task}.jsonl there, or leave {task} out of task_names."
            ) from error


def _download(task: str) -> bytes:
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(_HUB, "data.zip", repo_type="dataset")
        with zipfile.ZipFile(archive) as packed:
            return packed.read(f"data/{task}.jsonl")
    except Exception as error:
        raise BenchError(
            f"data.longbench: cannot get {task}.jsonl of {_HUB} from the hub "
            f"({type(error).__name__}: {error!s:.200}). Download data.zip of that data set "
            "yourself, unpack it and set data.longbench to 'file:FOLDER'."
        ) from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = read_json(line)
    except ValueError as error:
        raise BenchError(f"{place}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise BenchError(f"{place}: expected a JSON object, found {type(row).__name__}.")
    for name, kind in _KINDS.items():
        if not isinstance(row.get(name), kind):
            raise BenchError(f"{place}: {name!r} is {row.get(name)!r:.60}, not a {kind.__name__}.")
    if not row["answers"]:
        raise BenchError(f"{place}: 'answers' is empty.")
    return row
