"""Merge a PEFT adapter into a model, so that methods and the full cache see plain weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvdock_bench.errors import BenchError
from kvdock_bench.plain_json import read_json

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def check_adapter(adapter_path: str) -> Path:
    """Return the adapter's folder if it holds one that is safe to load, and PEFT is there."""
    folder = Path(adapter_path).expanduser()
    if not (folder / _CONFIG).is_file():
        raise BenchError(f"--adapter_path {adapter_path}: no folder with {_CONFIG}.")
    if not (folder / _WEIGHTS).is_file():
        raise BenchError(
            f"--adapter_path {adapter_path}: no {_WEIGHTS}. Other weight formats can run code when"
            " loaded and are refused: save the adapter with save_pretrained() first."
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BenchError(
            f"--adapter_path needs PEFT ({error}). Install it: pip install 'kvdock-bench[peft]'"
        ) from error
    return folder


def merge_adapter(model: Any, adapter_path: str) -> tuple[Any, str]:
    """Return the model with the adapter's weights added, and the adapter's identity."""
    from peft import PeftModel

    folder = check_adapter(adapter_path)
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchError(
            f"--adapter_path {adapter_path} does not fit the model: {reason}"
        ) from error
    return merged, _identity(folder)


def _identity(folder: Path) -> str:
    """Return a hash of the adapter's configuration and of all its weights."""
    try:
        config = read_json((folder / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{folder / _CONFIG}: not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise BenchError(f"{folder / _CONFIG} does not hold a JSON object.")
    # say where the base model lay and what wrote the file, not what the adapter does
    for name in ("base_model_name_or_path", "peft_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with (folder / _WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
