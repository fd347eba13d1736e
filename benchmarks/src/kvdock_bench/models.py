"""Find, check and load a model: the embedded default, a local folder, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdock_bench.context import context_of
from kvdock_bench.convert import convert_gguf, quiet_transformers, set_pad_token
from kvdock_bench.errors import BenchError
from kvdock_bench.fetch import SMOLLM2, prepare
from kvdock_bench.fingerprint import fingerprint
from kvdock_bench.shape import KVShape, kv_shape

EMBEDDED = {"smollm2-135m": (SMOLLM2, KVShape(30, 3, 64, 64))}
EMBEDDED_CONTEXT = {"smollm2-135m": 8192}
DTYPES = ("float32", "float16", "bfloat16")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what a record must say about it."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    shape: KVShape
    dtype: str

    @property
    def item_bytes(self) -> int:
        """Return the bytes of one cached number."""
        return 4 if self.dtype == "float32" else 2


def short_name(model_path: str) -> str:
    """Return the last part of a path or hub id, for folder names and titles."""
    return Path(model_path.rstrip("/")).name or "model"


def parse_dtype(text: str | None, device: str) -> str:
    """Return a dtype's name from "bfloat16" or "torch.bfloat16".

    On CPU the default is float32: without bfloat16 instructions bfloat16 prefill is several times
    slower, and results stay comparable between machines.
    """
    if text is None:
        return "float32" if device == "cpu" else "bfloat16"
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise BenchError(f"--torch_dtype is {text!r}, expected one of {', '.join(DTYPES)}.")
    return name


def parse_device(devices: list[str] | None) -> str:
    """Return "cpu" or "cuda:N" for the --device values; no value takes the first GPU, else cpu."""
    import torch

    names = [device.removeprefix("cuda:") for device in devices or []]
    if len(names) > 1:
        raise BenchError(
            f"--device names {len(names)} devices ({' '.join(names)}); more than one is not "
            "available in this version. Name one: --device 0"
        )
    count = torch.cuda.device_count()
    if not names:
        return "cuda:0" if count else "cpu"
    if names[0] == "cpu":
        return "cpu"
    if not names[0].isdecimal():
        raise BenchError(f"--device is {names[0]!r}, expected cpu or the index of a GPU.")
    if int(names[0]) >= count:
        raise BenchError(f"--device {names[0]}: torch sees {count} GPUs. Name one of them, or cpu.")
    return f"cuda:{int(names[0])}"


def locate(model_path: str) -> str:
    """Return the local folder of a model, fetching the embedded default; hub ids stay as given."""
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if model_path.lower() in EMBEDDED:
        name = model_path.lower()
        return str(prepare(name, EMBEDDED[name][0], convert_gguf))
    if not _HUB_ID.fullmatch(model_path):
        raise BenchError(
            f"Model folder {model_path} does not exist. Pass a folder with config.json, a hub id "
            f"(owner/name), or {', '.join(EMBEDDED)}."
        )
    return model_path


def peek_shape(model_path: str) -> KVShape | None:
    """Return the cache's shape without loading weights or fetching the embedded model."""
    if model_path.lower() in EMBEDDED and not Path(model_path).is_dir():
        return EMBEDDED[model_path.lower()][1]
    return kv_shape(_peek_config(model_path))


def peek_context(model_path: str) -> int | None:
    """Return a model's context in tokens as its config says, without fetching the embedded one."""
    if model_path.lower() in EMBEDDED and not Path(model_path).is_dir():
        return EMBEDDED_CONTEXT[model_path.lower()]
    return context_of(_peek_config(model_path))


def load(model_path: str, *, dtype: str, device: str) -> Loaded:
    """Load model and tokenizer; safetensors only, never code from the model's folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = locate(model_path)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise _unusable(model_path, error) from error
    set_pad_token(tokenizer)
    model.eval().to(device)
    mark = fingerprint(place, model.config, dtype)
    return Loaded(short_name(model_path), model, tokenizer, mark, kv_shape(model.config), dtype)


@dataclass(frozen=True, slots=True)
class Weightless:
    """What is known of a model whose weights another process holds."""

    config: Any
    generation_config: Any
    device: Any


def describe(model_path: str, *, dtype: str, device: str) -> Loaded:
    """Return the tokenizer and all that is known of a model, without its weights."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    place = locate(model_path)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            try:
                generation = GenerationConfig.from_pretrained(place)
            except OSError:
                # as a model does that comes without the file
                generation = GenerationConfig.from_model_config(config)
    except (OSError, ValueError) as error:
        raise _unusable(model_path, error) from error
    set_pad_token(tokenizer)
    model = Weightless(config, generation, torch.device(device))
    mark = fingerprint(place, config, dtype)
    return Loaded(short_name(model_path), model, tokenizer, mark, kv_shape(config), dtype)


def _peek_config(model_path: str) -> Any:
    from transformers import AutoConfig

    place = locate(model_path)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unusable(model_path, error) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BenchError(f"Model folder {folder} has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise BenchError(
            f"Model folder {folder} has no .safetensors file. Other weight formats can run code "
            "when loaded and are refused: save the model with save_pretrained() first."
        )


def _unusable(model_path: str, error: Exception) -> BenchError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BenchError(
        f"Model {model_path!r} cannot be loaded: {reason}\nPass a folder with config.json and "
        f"safetensors, a hub id that can be reached, or {', '.join(EMBEDDED)}."
    )
