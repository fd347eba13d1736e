"""What the speed scripts share: device time, and what a reader needs to judge a number."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers

import kvdock

GIB = 2**30


def event() -> torch.cuda.Event:
    """Record the present moment of the device."""
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    return now


def milliseconds(run: Callable[[], Any], *, repeats: int = 10, warm_up: int = 2) -> float:
    """Return the mean device time of a call."""
    for _ in range(warm_up):
        run()
    start = event()
    for _ in range(repeats):
        run()
    stop = event()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / repeats


def environment(**more: Any) -> dict[str, Any]:
    """Return command, commit, versions and hardware, with the copy bandwidth measured now."""
    source, target = (torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * GIB / milliseconds(lambda: target.copy_(source)) / 1e9
    return {
        "command": " ".join(sys.argv),
        "commit": os.environ.get("KVDOCK_COMMIT") or _commit(),
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(bandwidth, 3),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "kvdock": kvdock.__version__,
        **more,
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
