"""What must be known about a run to judge or repeat it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvdock_bench.fingerprint import file_hashes, short_hash
from kvdock_bench.models import Loaded

_PACKAGES = ("kvdock", "kvdock-bench", "torch", "transformers", "tokenizers", "wonderwords")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "KVDOCK_DISABLE",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def now() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def describe_model(loaded: Loaded, place: str) -> dict[str, Any]:
    """Return the model's name, identity and files."""
    folder = Path(place)
    template = loaded.tokenizer.chat_template
    return {
        "name": loaded.name,
        "fingerprint": loaded.fingerprint,
        "dtype": loaded.dtype,
        "attention": loaded.model.config._attn_implementation,
        "files": file_hashes(folder) if folder.is_dir() else {},
        "chat_template": short_hash(template) if template else None,
        "adapter": loaded.adapter,
    }


def describe_software(methods: list[str]) -> dict[str, str]:
    """Return the versions of everything that can change a number."""
    import torch

    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *(f"kvdock-{method}" for method in methods)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    # the part after + names a build, which "cuda" says better
    found["torch"] = torch.__version__.split("+")[0]
    found["cuda"] = torch.version.cuda or ""
    return found


def describe_hardware(devices: Sequence[Any], shards: int = 1) -> dict[str, Any]:
    """Return processor, memory, and the GPUs that one model runs on.

    Args:
        devices: the torch devices of this process's weights.
        shards: processes that hold a part of every layer, each on a device of this kind.
    """
    import torch

    memory = None
    if devices[0].type == "cuda":
        memory = torch.cuda.get_device_properties(devices[0]).total_memory
    count = len(devices) * shards
    name = device_name(devices[0])
    return {
        "device": f"{count} × {name}" if count > 1 else name,
        "device_memory": memory,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def device_name(device: Any) -> str:
    """Return the GPU's or the processor's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def describe_git() -> dict[str, Any] | None:
    """Return the commit of the checkout this package runs from, None for an installed one."""
    sha = _git("rev-parse", "HEAD")
    if sha is None:
        return None
    return {"sha": sha, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def environment() -> dict[str, str]:
    """Return the environment variables that matter and are set."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
