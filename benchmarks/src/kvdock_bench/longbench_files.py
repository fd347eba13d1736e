"""LongBench's rows: `TASK.jsonl` files of a folder, or of a pinned archive on the hub."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

from kvdock_bench.errors import BenchError
from kvdock_bench.plain_json import read_texts

_HUB = "zai-org/LongBench"
_PINNED = re.compile(r"hub@[0-9a-f]{40}")
_KINDS = {"input": str, "context": str, "answers": list}
_LISTS = (list, type(None))


class LongBenchFiles:
    """Read files when a task first needs them.

    Args:
        source: "hub@COMMIT" downloads the archive of a commit, once; "file:FOLDER" reads a folder.
    """

    def __init__(self, source: str | None) -> None:
        if source is None:
            raise BenchError(
                "LongBench's texts do not come with the package. Set data.longbench to "
                f"'file:FOLDER', a folder with hotpotqa.jsonl and the others, or to 'hub@COMMIT' to"
                f" download {_HUB} as it was at a commit."
            )
        on_hub = source.startswith("hub@")
        self._commit = source.removeprefix("hub@") if on_hub else None
        self._folder = None if on_hub else Path(source.removeprefix("file:")).expanduser()
        self._read: dict[str, tuple[list[dict[str, Any]], str]] = {}

    @property
    def label(self) -> str:
        """Return the data source for the tables."""
        if self._folder is None:
            return f"hub: {_HUB} at {self._commit}"
        return f"user folder: {self._folder.name}"

    def rows(self, task: str) -> list[dict[str, Any]]:
        """Return the rows of a task."""
        return self._load(task)[0]

    def digest(self, task: str) -> str:
        """Return the SHA-256 of a task's file."""
        return self._load(task)[1]

    def _load(self, task: str) -> tuple[list[dict[str, Any]], str]:
        if task not in self._read:
            origin, raw = self._bytes(task)
            try:
                lines = raw.decode("utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise BenchError(f"{origin}: not UTF-8 ({error}).") from error
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
            return f"{_HUB}, {task}.jsonl", _download(task, self._commit)
        path = self._folder / f"{task}.jsonl"
        try:
            return str(path), path.read_bytes()
        except OSError as error:
            raise BenchError(
                f"data.longbench: cannot read {path} ({error.strerror or error}). Put LongBench's "
                f"{task}.jsonl there, or leave {task} out of task_names."
            ) from error


def check_source(value: str) -> str:
    """Return a value of `data.longbench`; a download has to name its commit."""
    if (value.startswith("file:") and len(value) > len("file:")) or _PINNED.fullmatch(value):
        return value
    raise ValueError(
        "expected 'file:FOLDER', or 'hub@' and the 40 hexadecimal digits of a commit, so that every"
        f" run downloads the same; huggingface.co/datasets/{_HUB}/commits/main lists them"
    )


def _download(task: str, commit: str | None) -> bytes:
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(_HUB, "data.zip", repo_type="dataset", revision=commit)
        with zipfile.ZipFile(archive) as packed:
            return packed.read(f"data/{task}.jsonl")
    except Exception as error:
        raise BenchError(
            f"data.longbench: cannot get {task}.jsonl of {_HUB} at {commit} from the hub "
            f"({type(error).__name__}: {error!s:.200}). Download data.zip of that data set "
            "yourself, unpack it and set data.longbench to 'file:FOLDER'."
        ) from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = read_texts(line)
    except ValueError as error:
        raise BenchError(f"{place}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise BenchError(f"{place}: expected a JSON object, found {type(row).__name__}.")
    for name, kind in _KINDS.items():
        if not isinstance(row.get(name), kind):
            raise BenchError(f"{place}: {name!r} is {row.get(name)!r:.60}, not a {kind.__name__}.")
    if not isinstance(row.get("all_classes"), _LISTS):
        raise BenchError(f"{place}: 'all_classes' is {row['all_classes']!r:.60}, not a list.")
    if not row["answers"]:
        raise BenchError(f"{place}: 'answers' is empty.")
    for name in ("answers", "all_classes"):
        if not all(isinstance(text, str) for text in row.get(name) or ()):
            raise BenchError(f"{place}: {name!r} is {row[name]!r:.60}, not a list of texts.")
    if not isinstance(row.get("language", ""), str):
        raise BenchError(f"{place}: 'language' is {row['language']!r:.60}, not a text.")
    return row
