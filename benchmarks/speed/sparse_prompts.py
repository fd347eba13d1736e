"""Time to first token of the Llama-3.1-8B shape with random weights, dense and sparse.

Random weights have no structure for a selector to find, so that the density it would choose says
nothing. A run marked "forced" pays for the real selection and then attends over random lists of a
density that is set: its time is that of a prompt with so much structure, its output means nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from long_prompt import llama_8b
from measure import GIB, event
from sparse_cases import random_lists
from sparse_kernels import Rows, table
from sparse_selection import Select, said, selectors
from torch import Tensor
from transformers import LlamaForCausalLM

import kvdock
from kvdock.kernels.blocks import BlockLists
from kvdock.kernels.sparse import SparseBackend, choose_sparse_backend
from kvdock.policy import AttentionParams, AttentionPolicy, ModelFacts

FORCED = (0.1, 0.2)


class DensePrefill(AttentionPolicy):
    """Leave every prompt to the dense backend, so that `attach` runs it."""

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, *, layer: int
    ) -> Tensor | None:
        """Decline."""
        return None


class Forced(AttentionPolicy):
    """Select in earnest, then attend over random lists of a given density."""

    def __init__(self, select: Select | None, density: float) -> None:
        self.select = select
        self.density = density
        self._lists: dict[int, BlockLists] = {}
        self._kernel: SparseBackend | None = None

    def bind(self, facts: ModelFacts, backend: str | None) -> None:
        """Choose the kernel."""
        assert facts.device is not None
        assert facts.dtype is not None
        assert facts.head_dim is not None
        self._kernel = choose_sparse_backend(backend, facts.device, facts.dtype, facts.head_dim)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, *, layer: int
    ) -> Tensor | None:
        """Attend over the same random lists in every layer."""
        assert self._kernel is not None
        length = key.shape[2]
        if length not in self._lists:
            self._lists = {length: random_lists(length, length, self.density)}
        if self.select is not None:
            self.select(query, key)
        return self._kernel.attend(query, key, value, self._lists[length], params)


def run(args: argparse.Namespace) -> tuple[Rows, str]:
    """Measure every system at every length."""
    model = llama_8b(args.layers)
    rows = []
    for length in args.lengths:
        prompt = torch.randint(10, 120_000, (1, length), device="cuda")
        dense: list[float] = []
        for name, attach in systems(model, args):
            row: dict[str, Any] = {"system": name, "tokens": length, "layers": args.layers}
            try:
                row |= first_token(model, prompt, attach, args.repeats)
                if name.startswith("dense"):
                    dense.append(row["ttft_ms"])
                row["speed_up_over_fastest_dense"] = round(min(dense) / row["ttft_ms"], 2)
            except Exception as failure:
                row["ttft_ms"] = f"{type(failure).__name__}: {failure}"[:160]
            rows.append(said(row))
    note = "\nforced: real selection, then random lists of the density given (random weights)."
    return rows, table(rows) + note


def systems(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> Iterable[tuple[str, Callable[[], Any] | None]]:
    """Yield the plain model, dense kernels under the dock, and sparse prefill."""
    yield "dense, transformers sdpa", None
    attach = partial(kvdock.attach, model)
    yield "dense, flash-attn-4", partial(attach, [DensePrefill()], backend="flash-attn-4")
    kernels = args.backends or ["flash-attn-4", "triton"]
    for label, select in selectors(args, first_only=True):
        for kernel in kernels:
            for share in FORCED:
                name = f"{label}, {kernel}, forced {share:.0%}"
                yield name, partial(attach, [Forced(select, share)], backend=kernel)


@torch.no_grad()
def first_token(
    model: LlamaForCausalLM,
    prompt: Tensor,
    attach: Callable[[], Any] | None,
    repeats: int,
) -> dict[str, Any]:
    """Return the median time of a prompt's forward with its cache, and the peak memory."""
    times, peak = [], 0
    with ExitStack() as stack:
        dock = stack.enter_context(attach()) if attach else None
        for repeat in range(repeats):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = event()
            cache = {"past_key_values": dock.new_cache()} if dock else {}
            output = model(prompt, logits_to_keep=1, use_cache=True, **cache)
            stop = event()
            stop.synchronize()
            del output, cache
            peak = torch.cuda.max_memory_allocated()
            if repeat:  # the first run compiles and warms up
                times.append(start.elapsed_time(stop))
    return {"ttft_ms": round(statistics.median(times), 1), "peak_gib": round(peak / GIB, 2)}
