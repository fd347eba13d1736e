"""The folder of one run: a safe name, one writer, and never anything deleted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvdock_bench.atomic import write_text
from kvdock_bench.errors import BenchError
from kvdock_bench.plain_json import read_json

_LONGEST = 120
_TAG = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{_LONGEST - 1}}}")
_RESERVED = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{name}{n}" for name in ("COM", "LPT") for n in range(10)),
}
RUN_FILE = "run.json"


def check_tag(tag: str) -> str:
    """Return the tag if it is one plain folder name."""
    if not _TAG.fullmatch(tag) or tag.endswith("."):
        raise BenchError(
            f"--save_tag {tag[: _LONGEST + 1]!r}: expected at most {_LONGEST} letters, digits and"
            " . _ + -, a letter or digit first (a folder name, no path)."
        )
    if _is_reserved(tag):
        raise BenchError(f"--save_tag {tag!r}: Windows keeps this name for a device. Add a word.")
    return tag


def default_tag(model: str, benchmark: str) -> str:
    """Return a tag made of the model's and the benchmark's names."""
    name = _plain(f"{model}_{benchmark}") or "run"
    return f"run-{name}" if _is_reserved(name) else name


def file_names(names: Sequence[str]) -> list[str]:
    """Return a plain file name for each of these names, no two alike in any case."""
    found: list[str] = []
    for name in names:
        plain = _plain(name) or "unnamed"
        taken = [other.lower() for other in found]
        found.append(f"{plain}-{len(found) + 1}" if plain.lower() in taken else plain)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-._+")[:_LONGEST].rstrip("-._+")


def _is_reserved(name: str) -> bool:
    return name.partition(".")[0].upper() in _RESERVED


def open_run(output: Path, tag: str, *, resume: bool, overwrite: bool) -> Path:
    """Return the run's folder, made and proven writable, before anything slow happens."""
    if resume and overwrite:
        raise BenchError("--resume and --overwrite exclude each other: continue, or start anew?")
    folder = output.expanduser() / check_tag(tag)
    if _is_used(folder) and not resume:
        if not overwrite:
            raise BenchError(
                f"{folder} holds a run already. Continue it with --resume, set it aside and start "
                "anew with --overwrite, or choose another --save_tag."
            )
        # a run at work must not lose its folder under its hands
        with locked(folder):
            _move_aside(folder)
    refuse_links(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise BenchError(
            f"Cannot write the output folder {folder} ({error.strerror or error}). "
            "Choose another with --output_dir."
        ) from error
    return folder


def refuse_links(folder: Path) -> None:
    """Refuse a folder of a stranger whose links would have a run write into files elsewhere."""
    for place in (*folder.glob("*"), *folder.glob("pred/*"), *folder.glob("pred/*/*")):
        if place.is_symlink():
            raise BenchError(
                f"{place} is a link, which no run makes, and writing would change what it points"
                " to. Put the files themselves there, or choose another --save_tag."
            )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one process; the lock ends with the process, however it ends."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise BenchError(f"Cannot write {folder} ({error.strerror or error}).") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BenchError(
            f"Another process is writing to {folder}. Wait for it, or stop it."
        ) from None
    try:
        yield
    finally:
        os.close(handle)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the run's metadata."""
    path = folder / RUN_FILE
    try:
        content = read_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{folder} is no run folder: it has no {RUN_FILE}.") from None
    except (OSError, ValueError) as error:
        raise BenchError(f"Cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise BenchError(f"{path} does not hold a JSON object.")
    return content


def find_run(name: str, output: Path) -> Path:
    """Return a run folder from its path or from its tag."""
    # a name that no folder can have is no run: too long, or of a user who is not there
    with contextlib.suppress(OSError, RuntimeError):
        for folder in (Path(name).expanduser(), output.expanduser() / name):
            if (folder / RUN_FILE).is_file():
                return folder
    raise BenchError(f"No run {name!r}: neither a run folder nor a --save_tag below {output}.")


def _is_used(folder: Path) -> bool:
    try:
        return any(entry.name != ".lock" for entry in folder.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BenchError(f"Cannot read {folder} ({error.strerror or error}).") from error


def _move_aside(folder: Path) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target, attempt = folder.with_name(f"{folder.name}.old-{stamp}"), 1
    while target.exists():
        attempt += 1
        target = folder.with_name(f"{folder.name}.old-{stamp}-{attempt}")
    try:
        folder.rename(target)
    except OSError as error:
        raise BenchError(f"Cannot move {folder} aside ({error.strerror or error}).") from error
