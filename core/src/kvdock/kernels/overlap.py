"""Start a kernel while the one before it still runs, on GPUs that can (compute capability 9).

A kernel launched so may do at once what needs nothing of its predecessors, such as reading weights;
before it touches anything else it has to wait for them, which `EARLY` tells its code. Every kernel
that starts early waits for the whole of its predecessor, which did the same, so a wait covers all
that was launched before.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN201  (what a kernel returns is the compiler's value, not Python's)

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a release that cannot wait, so `launch` never lets a kernel start early
    gdc_launch_dependents = gdc_wait = None

_enabled = os.environ.get("KVDOCK_EARLY") != "0"


def launch(device: torch.device) -> dict[str, Any]:
    """Return the arguments of a launch on this device: whether it starts early."""
    if _enabled and _can(device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@contextmanager
def starting(early: bool) -> Iterator[None]:
    """Let kernels launched inside the block start early, or after their predecessors end."""
    global _enabled
    before, _enabled = _enabled, early
    try:
        yield
    finally:
        _enabled = before


@cache
def _can(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None or gdc_wait is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Allow the next kernel to start, as soon as every program of this one says so."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait until everything launched before is done and its results can be read."""
    if EARLY:
        gdc_wait()
