"""Find, check and load a model: the embedded default, a local folder, or a hub id."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdock.errors import KVDockError
from kvdock_bench.adapter import merge_adapter
from kvdock_bench.context import context_of
from kvdock_bench.convert import convert_gguf, quiet_transformers, set_pad_token
from kvdock_bench.errors import BenchError
from kvdock_bench.fetch import SMOLLM2, prepare
from kvdock_bench.fingerprint import fingerprint, short_hash
from kvdock_bench.placement import Place, parse_placement
from kvdock_bench.shape import KVShape, kv_shape

EMBEDDED = {"smollm2-135m": (SMOLLM2, KVShape(30, 3, 64, 64))}
EMBEDDED_CONTEXT = {"smollm2-135m": 8192}
DTYPES = ("float32", "float16", "bfloat16")

_LONGEST_ID = 193
"""An owner and a name of 96 characters each, as on the hub."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what a record must say about it.

    Args:
        shards: processes that each hold a part of every layer.
        adapter: the name of the adapter merged into the weights.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    shape: KVShape
    dtype: str
    shards: int = 1
    adapter: str | None = None

    @property
    def devices(self) -> list[Any]:
        """Return the torch devices of this process that hold weights, the first layers' first."""
        if isinstance(self.model, Weightless):
            return [self.model.device]
        return list(dict.fromkeys(weight.device for weight in self.model.parameters()))

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
    """Return "cpu" or "cuda:N" for one --device value; no value takes the first GPU, else cpu."""
    import torch

    placement = parse_placement(devices or [], visible=torch.cuda.device_count())
    if placement.several_processes:
        raise BenchError(f"--device {' '.join(devices or [])}: this program takes one device.")
    return placement.devices(0)[0]


def locate(model_path: str) -> str:
    """Return the local folder of a model, fetching the embedded default; hub ids stay as given."""
    # a name that no folder can have is none: too long, or of a user who is not there
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(model_path).expanduser()
        if folder.is_dir():
            _check_folder(folder)
            return str(folder)
    if model_path.lower() in EMBEDDED:
        name = model_path.lower()
        return str(prepare(name, EMBEDDED[name][0], convert_gguf))
    if not _HUB_ID.fullmatch(model_path) or len(model_path) > _LONGEST_ID:
        raise BenchError(
            f"Model folder {model_path} does not exist. Pass a folder with config.json, a hub id "
            f"(owner/name), or {', '.join(EMBEDDED)}."
        )
    return model_path


def warn_of_remote_code(model_path: str) -> None:
    """Say on stderr what --trust_remote_code allows, before it allows it."""
    print(
        f"Warning: --trust_remote_code: Python code that comes with {model_path} runs with all of"
        " your rights. Read it first.",
        file=sys.stderr,
    )


def peek_shape(model_path: str, *, trust_remote_code: bool = False) -> KVShape | None:
    """Return the cache's shape without loading weights or fetching the embedded model."""
    if model_path.lower() in EMBEDDED and not Path(model_path).is_dir():
        return EMBEDDED[model_path.lower()][1]
    with _told(model_path):
        return kv_shape(_peek_config(model_path, trust_remote_code))


def peek_context(model_path: str, *, trust_remote_code: bool = False) -> int | None:
    """Return a model's context in tokens as its config says, without fetching the embedded one."""
    if model_path.lower() in EMBEDDED and not Path(model_path).is_dir():
        return EMBEDDED_CONTEXT[model_path.lower()]
    with _told(model_path):
        return context_of(_peek_config(model_path, trust_remote_code))


def load(
    model_path: str,
    *,
    dtype: str,
    device: str | Place,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load model and tokenizer; safetensors only.

    Args:
        adapter_path: a PEFT adapter that is merged into the weights.
        trust_remote_code: also run Python code that the model brings with it.
    """
    from transformers import AutoTokenizer

    from kvdock_bench.loading import load_weights

    place = Place((device,)) if isinstance(device, str) else device
    source = locate(model_path)
    with _told(model_path):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = load_weights(source, dtype, place, trust_remote_code=trust_remote_code)
        shape = kv_shape(model.config)
        mark = fingerprint(source, model.config, dtype)
    set_pad_token(tokenizer)
    if adapter_path is not None:
        model, adapter = merge_adapter(model, adapter_path)
        mark = short_hash({"base": mark, "adapter": adapter})
    return Loaded(
        name=short_name(model_path),
        model=model.eval(),
        tokenizer=tokenizer,
        fingerprint=mark,
        shape=shape,
        dtype=dtype,
        shards=place.ranks,
        adapter=None if adapter_path is None else short_name(adapter_path),
    )


@dataclass(frozen=True, slots=True)
class Weightless:
    """What is known of a model whose weights another process holds."""

    config: Any
    generation_config: Any
    device: Any


def describe(
    model_path: str, *, dtype: str, device: str, trust_remote_code: bool = False
) -> Loaded:
    """Return the tokenizer and all that is known of a model, without its weights."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    place = locate(model_path)
    with _told(model_path):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        try:
            generation = GenerationConfig.from_pretrained(place)
        except OSError:
            # as a model does that comes without the file
            generation = GenerationConfig.from_model_config(config)
        shape = kv_shape(config)
        mark = fingerprint(place, config, dtype)
    set_pad_token(tokenizer)
    model = Weightless(config, generation, torch.device(device))
    return Loaded(short_name(model_path), model, tokenizer, mark, shape, dtype)


def _peek_config(model_path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(locate(model_path), trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _told(model_path: str) -> Iterator[None]:
    """Turn whatever a damaged folder, or a model's own code, makes of loading into one error."""
    from kvdock_bench.oom import is_oom

    try:
        with quiet_transformers():
            yield
    except KVDockError:
        raise
    except Exception as error:
        if is_oom(error):
            raise
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
    if "trust_remote_code" in str(error):
        return BenchError(
            f"Model {model_path!r} brings Python code of its own, which is not run unasked. Read"
            " it, and if you trust it with all of your rights, add --trust_remote_code."
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BenchError(
        f"Model {model_path!r} cannot be loaded: {reason:.500}\nPass a folder with config.json and "
        f"safetensors, a hub id that can be reached, or {', '.join(EMBEDDED)}."
    )
