"""Mark the moments of one `generate` call: the end of prefill, the first token, the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from kvdock_bench.record import Timings


class PrefillEnd(LogitsProcessor):
    """Count steps; the first scores mark the end of prefill, chunked or not."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores untouched."""
        self._watch.steps += 1
        if self._watch.steps == 1:
            self._watch.prefill_end = self._watch.now()
            self._watch.held = self._watch.held_bytes()
        return scores


class FirstToken(StoppingCriteria):
    """Note when the first token is chosen; never stops anything."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """Return False for every row."""
        if self._watch.steps == 1:
            self._watch.first_token = self._watch.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class Watch:
    """The marks of one `generate` call; the device is idle at each."""

    def __init__(self, devices: Sequence[torch.device], held_bytes: Callable[[], int]) -> None:
        self.steps = self.held = 0
        self.held_bytes = held_bytes
        self._devices = devices
        self.start = self.prefill_end = self.first_token = self.now()

    def now(self) -> float:
        """Wait for the devices and return the time."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timings(self, rows: int) -> Timings:
        """Return the times up to now; call it when `generate` has returned."""
        end = self.now()
        decode = end - self.first_token
        return Timings(
            prefill_s=self.prefill_end - self.start,
            ttft_s=self.first_token - self.start,
            decode_s=decode,
            tpot_s=decode / (self.steps - 1) if self.steps > 1 else None,
            generate_s=(end - self.start) / rows,
        )
