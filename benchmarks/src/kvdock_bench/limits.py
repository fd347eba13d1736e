"""How many prompts at once, and how long an answer may take."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from kvdock_bench.errors import BenchError
from kvdock_bench.models import Loaded, Weightless

_LARGEST = 64
_SHARE = 4
"""A batch starts with at most this part of the free memory in its full caches; weights' inputs and
outputs take as much again, and running out costs one batch only."""


class TimeLimit(Exception):
    """Say that an answer took longer than it may."""


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` in the block once it has run for so long.

    Python gets to it between two calls into torch, so a single endless kernel is not stopped.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise BenchError("--time_limit needs the main thread of a process, where signals arrive.")

    def over(number: int, frame: Any) -> None:
        raise TimeLimit(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class BatchSizes:
    """Know the largest batch of each method and length, and learn when memory runs out.

    Args:
        chosen: --batch_size; "auto" starts from the free memory of the devices.
    """

    def __init__(self, chosen: int | str, loaded: Loaded) -> None:
        self._chosen, self._loaded = chosen, loaded
        self._learnt: dict[str, dict[int, int]] = {}

    def limit(self, method_id: str, length: int) -> int:
        """Return how many prompts of this length may go together."""
        learnt = self._learnt.get(method_id, {})
        # what was too much for shorter prompts is too much for these
        known = [size for at, size in learnt.items() if at <= length]
        return min([self._start(length), *known])

    def learn(self, method_id: str, length: int, size: int) -> None:
        """Note the most that fitted, or may yet."""
        self._learnt.setdefault(method_id, {})[length] = size

    def _start(self, length: int) -> int:
        if isinstance(self._chosen, int):
            return self._chosen
        devices = [device for device in self._loaded.devices if device.type == "cuda"]
        if not devices:
            return 4
        # where other processes hold the memory, its free part says another number to each
        elsewhere = self._loaded.shards > 1 or isinstance(self._loaded.model, Weightless)
        if elsewhere or length == 0:  # a length that is not known yet
            return 16
        free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
        one = self._loaded.shape.full_bytes(length, self._loaded.item_bytes)
        rows = free // (_SHARE * max(1, one))
        return min(_LARGEST, 1 << max(0, int(rows).bit_length() - 1))
