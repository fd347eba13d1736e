"""What the arguments of `kvdock bench` ask for, or why not, before anything slow happens."""

from __future__ import annotations

from typing import Any

import torch

from kvdock_bench import models
from kvdock_bench.adapter import check_adapter
from kvdock_bench.arguments import Arguments
from kvdock_bench.config import BenchConfig, load_config, override
from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.methods import VLLM, MethodConfig, parse_methods
from kvdock_bench.placement import Placement, parse_placement
from kvdock_bench.vllm.locate import find_python
from kvdock_bench.vllm.serve import Engine

SERVERS = ("transformers", "vllm")


def parse_columns(arguments: Arguments) -> dict[str, list[MethodConfig]]:
    """Return the table's columns by the server that answers for them, transformers first."""
    servers = set(arguments.server)
    if unknown := sorted(servers - set(SERVERS)):
        raise BenchError(f"--server {unknown[0]} is unknown.{did_you_mean(unknown[0], SERVERS)}")
    for name in ("vllm_python", "max_model_len", "gpu_memory_utilization"):
        if "vllm" not in servers and getattr(arguments, name) is not None:
            raise BenchError(f"--{name} is for vLLM. Add --server vllm, or leave it out.")
    columns = {}
    if "transformers" in servers:
        columns["transformers"] = parse_methods(
            arguments.acceleration, arguments.budget, arguments.settings
        )
    elif arguments.acceleration:
        raise BenchError(
            f"--acceleration {' '.join(arguments.acceleration)} needs transformers, vLLM runs no "
            "method of kvdock. Write --server transformers vllm for both in one table."
        )
    if "vllm" in servers:
        columns["vllm"] = [VLLM]
    return columns


def find_engine(arguments: Arguments) -> Engine | None:
    """Return how vLLM is to be run, None where it is not asked for."""
    if "vllm" not in arguments.server:
        return None
    python = find_python(arguments.vllm_python)
    return Engine(
        python,
        arguments.max_model_len,
        arguments.gpu_memory_utilization,
        arguments.trust_remote_code,
    )


def effective_config(arguments: Arguments) -> BenchConfig:
    """Return the config with the command line's changes, checked as a whole."""
    config = load_config(arguments.cfg_path)
    changes: dict[str, Any] = {}
    if arguments.limit is not None:
        changes["num_samples"] = min(arguments.limit, config.num_samples)
    if arguments.batch_size is not None:
        text = arguments.batch_size
        changes["batch_size"] = int(text) if text.isdecimal() else text
    if arguments.max_length is not None:
        changes["max_length"] = arguments.max_length
    if arguments.template is not None:
        raw = arguments.template.lower() in ("none", "null", "raw")
        changes["template"] = None if raw else arguments.template
    return override(config, **changes) if changes else config


def choose_placement(arguments: Arguments) -> Placement:
    """Return where the models go, after a check of the flags that depend on it."""
    placement = parse_placement(
        arguments.device,
        arguments.gp_num,
        parallel=arguments.parallel,
        workers=arguments.workers,
        ray_address=arguments.ray_address,
        visible=torch.cuda.device_count(),
    )
    if arguments.time_limit is not None and arguments.time_limit <= 0:
        raise BenchError(f"--time_limit {arguments.time_limit:g}: expected seconds above 0.")
    if arguments.adapter_path is not None:
        check_adapter(arguments.adapter_path)
        if placement.processes > 1:
            raise BenchError(
                "--adapter_path: an adapter is merged into whole weights, which --parallel tp"
                " splits. Use --parallel map, or merge it beforehand."
            )
    if "vllm" in arguments.server:
        _check_served(arguments, placement)
    if placement.several_processes:
        # fetches and converts the embedded model once, before the workers look for it
        models.locate(arguments.model_path)
    return placement


def _check_served(arguments: Arguments, placement: Placement) -> None:
    """Refuse for vLLM what only the models of this package can do."""
    if placement.several_processes or len(placement.devices(0)) > 1:
        raise BenchError(
            "--server vllm runs on one device. Run it alone on one, with --resume into the folder"
            " of the others."
        )
    for name in ("adapter_path", "time_limit"):
        if getattr(arguments, name) is not None:
            raise BenchError(f"--{name} is for --server transformers alone.")


def check_dtypes(methods: list[MethodConfig], dtype: str) -> None:
    """Refuse a dtype that one of the methods does not support."""
    for method in methods:
        if method.ids and dtype not in method.dtypes:
            raise BenchError(
                f"{method.label} does not support --torch_dtype {dtype}, only "
                f"{', '.join(method.dtypes) or 'none'}."
            )
