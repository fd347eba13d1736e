"""Identify a model by content, so that a resumed run never mixes two of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_EDGE = 1 << 20
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def short_hash(content: Any, length: int = 16) -> str:
    """Return the start of the SHA-256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def fingerprint(place: str, config: Any, dtype: str) -> str:
    """Return the identity of a loaded model: its files' content, or its hub commit, and dtype."""
    folder = Path(place)
    if folder.is_dir():
        return short_hash({"files": file_hashes(folder), "dtype": dtype})
    commit = getattr(config, "_commit_hash", None)
    return short_hash({"hub": place, "commit": commit, "dtype": dtype})


def file_hashes(folder: Path) -> dict[str, str]:
    """Return size and hash of each file that decides what the model computes.

    Weights are hashed at both edges only: the header at the front names every tensor, and reading
    all of a large model would take longer than a short run.
    """
    hashes = {}
    for name in _FILES:
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text("utf-8"))
            # tells who wrote the file, not what it means
            content.pop("transformers_version", None)
            hashes[name] = short_hash(content)
    for path in sorted(folder.glob("*.py")):
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_EDGE))
            size = path.stat().st_size
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
        hashes[path.name] = f"{size}:{digest.hexdigest()[:16]}"
    return hashes
