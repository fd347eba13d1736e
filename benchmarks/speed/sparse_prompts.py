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
from itertools import product
from typing import Any

import torch
from baseline import GIB, llama_8b
from measure import event
from sparse_cases import SCALING, random_lists, states
from sparse_kernels import Rows, table
from sparse_selection import Select, said, selectors
from torch import Tensor
from transformers import LlamaForCausalLM

import kvdock
from kvdock.kernels.blocks import BlockLists
from kvdock.kernels.sparse import SparseBackend, choose_sparse_backend
from kvdock.policy import AttentionParams, AttentionPolicy, ModelFacts

FORCED = (0.1, 0.15)
WARM_UP_TOKENS = 17_408
"""More than what is run in slices, so that this is compiled too."""


class DensePrefill(AttentionPolicy):
    """Leave every prompt to the dense backend, so that `attach` runs it."""

    def warm_up(self, length: int) -> None:
        """Do nothing: a short prompt compiles the dense kernel."""

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

    def warm_up(self, length: int) -> None:
        """Make the lists, and run selection and kernel once: they are compiled for a length."""
        query, key, value = states(length, length)
        self.prefill(query, key, value, AttentionParams(SCALING), layer=0)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, *, layer: int
    ) -> Tensor | None:
        """Attend over the same random lists in every layer."""
        assert self._kernel is not None
        length = key.shape[2]
        if length not in self._lists:
            self._lists[length] = random_lists(length, length, self.density)
        if self.select is not None:
            self.select(query, key)
        return self._kernel.attend(query, key, value, self._lists[length], params)


Policy = DensePrefill | Forced


def run(args: argparse.Namespace) -> tuple[Rows, str]:
    """Measure every system at every length."""
    model = llama_8b(args.layers)
    rows = []
    for length in args.lengths:
        prompt = torch.randint(10, 120_000, (1, length), device="cuda")
        dense: list[float] = []
        for name, policy, attach in systems(model, args):
            row: dict[str, Any] = {"system": name, "tokens": length, "layers": args.layers}
            try:
                row |= first_token(model, prompt, policy, attach, args.repeats)
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
) -> Iterable[tuple[str, Policy | None, Callable[[], Any] | None]]:
    """Yield the plain model, dense kernels under the dock, and sparse prefill.

    The first method runs on every kernel and at every density, the others in the first case.
    """
    yield "dense, transformers sdpa", None, None

    def attached(policy: Policy, backend: str) -> Callable[[], Any]:
        return partial(kvdock.attach, model, [policy], backend=backend)

    plain = DensePrefill()
    yield "dense, flash-attn-4", plain, attached(plain, "flash-attn-4")
    cases = [*product(args.backends or ["flash-attn-4", "triton"], FORCED)]
    for number, (label, select) in enumerate(selectors(args, first=1)):
        for kernel, share in cases[: 1 if number else None]:
            policy = Forced(select, share)
            yield f"{label}, {kernel}, forced {share:.0%}", policy, attached(policy, kernel)


@torch.no_grad()
def first_token(
    model: LlamaForCausalLM,
    prompt: Tensor,
    policy: Policy | None,
    attach: Callable[[], Any] | None,
    repeats: int,
) -> dict[str, Any]:
    """Return the median time of a prompt's forward with its cache, and the peak memory.

    What compiles and warms up runs before, on the prompt's first tokens and on one layer.
    """
    times, peak = [], 0
    with ExitStack() as stack:
        dock = stack.enter_context(attach()) if attach else None
        if policy is not None:
            policy.warm_up(prompt.shape[1])
        for text in [prompt[:, :WARM_UP_TOKENS], *[prompt] * repeats]:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            start = event()
            cache = {"past_key_values": dock.new_cache()} if dock else {}
            output = model(text, logits_to_keep=1, use_cache=True, **cache)
            stop = event()
            stop.synchronize()
            del output, cache
            if text is prompt:
                peak = torch.cuda.max_memory_allocated()
                times.append(start.elapsed_time(stop))
    return {"ttft_ms": round(statistics.median(times), 1), "peak_gib": round(peak / GIB, 2)}
