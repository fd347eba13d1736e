"""Start vLLM for a run: what the engine is told, and what the run says of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdock_bench import models
from kvdock_bench.schema import BenchConfig
from kvdock_bench.vllm.generate import VLLMGenerator, check_settings
from kvdock_bench.vllm.process import Worker

LOG = "vllm.log"
_AUTO = -1
"""vLLM's word for the longest context that the model allows and the memory holds."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What the user chose for vLLM.

    Args:
        python: the interpreter of its environment.
        memory_share: of the GPU's memory, or of the machine's where vLLM is built for CPUs.
        trust_remote_code: run code that the model brings with it.
    """

    python: Path
    max_model_len: int | None = None
    memory_share: float | None = None
    trust_remote_code: bool = False


@contextlib.contextmanager
def serving(
    engine: Engine, loaded: models.Loaded, place: str, config: BenchConfig, folder: Path
) -> Iterator[tuple[VLLMGenerator, dict[str, Any]]]:
    """Yield the generator and a description for run.json; the process ends with the block.

    Args:
        loaded: the model without its weights.
        place: the model's folder or hub id.
    """
    device = loaded.model.device
    check_settings(loaded.model.generation_config, do_sample=config.generation.do_sample)
    worker = Worker(engine.python, folder / LOG, environment=_environment(device))
    settings = engine_arguments(engine, loaded, place, config)
    try:
        ready = worker.start(platform=device.type, engine=settings)
        generator = VLLMGenerator(
            worker,
            ready,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            shape=loaded.shape,
            item_bytes=loaded.item_bytes,
        )
        ready.pop("event")
        told = {name: value for name, value in settings.items() if name != "model"}
        yield generator, {**ready, "engine": told}
    finally:
        worker.close()


def engine_arguments(
    engine: Engine, loaded: models.Loaded, place: str, config: BenchConfig
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    arguments: dict[str, Any] = {
        "model": place,
        "dtype": loaded.dtype,
        "load_format": "safetensors",
        "trust_remote_code": engine.trust_remote_code,
        "max_model_len": engine.max_model_len or _AUTO,
        "seed": 0,
    }
    commit = getattr(loaded.model.config, "_commit_hash", None)
    if commit is not None:
        # the very weights that the record's fingerprint names
        arguments["revision"] = arguments["tokenizer_revision"] = commit
    if engine.memory_share is not None:
        arguments["gpu_memory_utilization"] = engine.memory_share
    elif loaded.model.device.type == "cpu":
        # its default asks for nearly all of the machine's memory
        batch = config.batch_size if isinstance(config.batch_size, int) else 4
        tokens = (batch + 1) * (engine.max_model_len or max(config.length))
        arguments["kv_cache_memory_bytes"] = loaded.shape.full_bytes(tokens, loaded.item_bytes)
    return arguments


def _environment(device: Any) -> dict[str, str]:
    """Return variables that show the worker the run's GPU and no other."""
    if device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    index = device.index or 0
    return {"CUDA_VISIBLE_DEVICES": names[index] if names else str(index)}
