"""The prediction files of a run: appended line by line, safe against a kill at any moment."""

from __future__ import annotations

import os
from pathlib import Path

from kvdock_bench.errors import BenchError
from kvdock_bench.record import Record


class RecordStore:
    """Append records to `pred/METHOD/TASK_LENGTH.jsonl` and know which keys are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pred"
        self.error_log = folder / "errors.log"
        self.by_key: dict[str, Record] = {}

    def load(self, *, repair: bool) -> None:
        """Read every file; the last record of a key wins.

        Args:
            repair: also cut a torn last line off, which the one writer of a run must do before it
                appends.
        """
        for path in sorted(self.folder.glob("*/*.jsonl")):
            for record in read_records(path, repair=repair):
                self.by_key[record.key] = record

    def is_finished(self, key: str) -> bool:
        """Tell whether this answer exists."""
        record = self.by_key.get(key)
        return record is not None and record.finished

    def append(self, cell: str, record: Record) -> None:
        """Add one record durably: a whole line reaches the disk, or none does."""
        path = self.folder / f"{cell}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append_line(path, record.to_line())
        except OSError as error:
            raise BenchError(
                f"Cannot write {path} ({error.strerror or error}). Finished samples are kept; "
                "make room and continue with --resume."
            ) from error
        self.by_key[record.key] = record

    def log(self, text: str) -> None:
        """Add the traceback of an unexpected error to errors.log."""
        try:
            with self.error_log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise BenchError(
                f"Cannot write {self.error_log} ({error.strerror or error})."
            ) from error


def read_records(path: Path, *, repair: bool = False) -> list[Record]:
    """Return a file's records; a torn last line is dropped, any other damage is an error."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchError(f"Cannot read {path} ({error.strerror or error}).") from error
    whole = content.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            records.append(Record.from_line(line))
        except ValueError as error:
            raise BenchError(
                f"{path}, line {number} is damaged: {error}. Delete that line to have the sample "
                "repeated, or start anew with --overwrite."
            ) from error
    # not before all of it has turned out to be ours
    if repair and whole < len(content):
        os.truncate(path, whole)
    return records


def _append_line(path: Path, line: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, line) != len(line):
            os.ftruncate(handle, before)
            raise OSError("the disk is full")
        os.fsync(handle)
    finally:
        os.close(handle)
