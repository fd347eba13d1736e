"""What the speed scripts share: device time, and what a reader needs to judge a number."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from baseline import GIB

import kvdock
from kvdock.graph import side_stream

COLD = 160 * 2**20
"""Bytes between two uses of the same memory: three times the second-level cache of an H100."""


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


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of a call and its output."""
    stream = side_stream(torch.device("cuda", torch.cuda.current_device()))
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph.capture_begin()  # without the collections of torch.cuda.graph, which cost more
        try:
            output = run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, output


def cold_microseconds(runs: list[Callable[[], Any]], budget: float) -> float:
    """Return the device time of a call, replayed over copies that are not in any cache.

    Args:
        runs: the same call on copies of its input, `COLD` bytes together or more.
        budget: milliseconds to spend; three replays are made at least, twenty at most.
    """
    if len(runs) > 1:  # short calls: enough of them to hide the start of a replay
        runs = runs * math.ceil(32 / len(runs))
    graph, _ = captured(lambda: [run() for run in runs])
    graph.replay()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 20):
        start = event()
        graph.replay()
        stop = event()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times) * 1e3 / len(runs)


def replayed_microseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the mean device time of a call replayed from a CUDA graph, without launch gaps."""
    run()
    graph, _ = captured(run)
    return milliseconds(graph.replay, repeats=repeats) * 1e3


def environment(**more: Any) -> dict[str, Any]:
    """Return command, commit, versions and hardware, with a GPU's copy bandwidth measured now."""
    return {
        "command": " ".join(sys.argv),
        "commit": os.environ.get("KVDOCK_COMMIT") or _commit(),
        **_device(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "kvdock": kvdock.__version__,
        **more,
    }


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    source, target = (torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * GIB / milliseconds(lambda: target.copy_(source)) / 1e9
    return {"gpu": torch.cuda.get_device_name(), "copy_tb_per_s": round(bandwidth, 3)}


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
