"""Time the selectors on planted data, alone and with attention; find where sparse starts to win.

Beside every speed stand the density, the output's relative Frobenius error against dense attention,
and the share of the true attention that the selected blocks hold.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from measure import milliseconds
from sparse_cases import PLANTED, SCALING, planted
from sparse_kernels import PARAMS, Rows, dense_calls, table, usable
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, BlockLists, density, mask_from_lists
from kvdock.kernels.sparse import SparseBackend

Select = Callable[[Tensor, Tensor], BlockLists]
Layer = tuple[Tensor, Tensor, Tensor]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "flexprefill": [
        {"mode": mode, "gamma": gamma} for gamma in (0.95, 0.9) for mode in ("compat", "exact")
    ],
    "xattention": [
        {"mode": mode, "stride": stride} for stride in (8, 16) for mode in ("compat", "exact")
    ],
}
"""The settings measured; of these the first, or the first two, where time is short."""
PLACES = {
    "flexprefill": ("kvdock_flexprefill.selection", "kvdock_flexprefill.options"),
    "xattention": ("kvdock_xattention.select", "kvdock_xattention.options"),
}
SAMPLED_QUERIES = 256
CROSSOVER = (4096, 8192, 16_384, 32_768)
CHECKED = (4096, 4097)
LONG_MS = 30.0
"""Calls that take longer are timed once at a time: their times scatter little."""


def run(section: str, args: argparse.Namespace) -> tuple[Rows, str]:
    """Run the section lists, selection or crossover."""
    make = {"lists": lists, "selection": selection, "crossover": crossover}[section]
    rows = list(make(args))
    return rows, table(rows)


def selectors(
    args: argparse.Namespace, *, first: int | None = None, name: str = "select", **changes: Any
) -> Iterable[tuple[str, Select]]:
    """Yield the installed selectors, or their references, with the ``first`` of their settings."""
    for method in args.methods:
        module, options = PLACES[method]
        try:
            select = getattr(importlib.import_module(module), name)
            records = vars(importlib.import_module(options))
        except ImportError as failure:
            print(f"{method}: not installed: {failure}", flush=True)
            continue
        kind = next(value for key, value in records.items() if key.lower() == f"{method}options")
        known = {key: value for key, value in changes.items() if hasattr(kind(), key)}
        for setting in SETTINGS[method][:first]:
            made = kind(**setting, **known)
            label = " ".join([method, *(f"{key}={value}" for key, value in setting.items())])
            yield label, partial(select, params=PARAMS, options=made)


@torch.no_grad()
def lists(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Compare the kernels' lists with plain torch; equal values may fall either way."""
    for length, data in product(CHECKED, PLANTED):
        query, key, _ = planted(length, PLANTED[data])
        pairs = zip(
            selectors(args, min_budget=128),
            selectors(args, name="select_reference", min_budget=128),
            strict=True,
        )
        for (label, select), (_, reference) in pairs:
            blocks = BlockGrid(length, length).key_blocks
            found, wanted = (
                mask_from_lists(run(query, key), blocks) for run in (select, reference)
            )
            differ, listed = int((found ^ wanted).sum()), int(wanted.sum())
            yield said(
                {"what": label, "tokens": length, "data": data, "listed": listed,
                 "differ": differ, "share": round(differ / listed, 6)}
            )  # fmt: skip


@torch.no_grad()
def selection(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Time selection and attention on planted data."""
    kernels = fast_kernels(args)
    for length in args.lengths:
        for data in args.data:
            layer = planted(length, PLANTED[data])
            dense = dict(dense_calls(*layer))
            for name, call in dense.items():
                yield said({"what": name, "tokens": length, "data": data, "total_ms": timed(call)})
            exact = next(iter(dense.values()))().float()
            for number, (label, select) in enumerate(selectors(args, first=args.settings)):
                row: dict[str, Any] = {"what": label, "tokens": length, "data": data}
                some = kernels if number % 4 == 0 else dict([*kernels.items()][:1])
                try:
                    row |= measured(select, some, layer, exact)
                except Exception as failure:
                    row["error"] = f"{type(failure).__name__}: {failure}"[:160]
                yield said(row)


def measured(
    select: Select, kernels: dict[str, SparseBackend], layer: Layer, exact: Tensor
) -> dict[str, Any]:
    """Return a selector's density and times, and how far its output is from dense attention."""
    q, k, v = layer
    lists = select(q, k)
    row = {"density": round(float(density(lists, q.shape[2], k.shape[2]).mean()), 4)}
    row["select_ms"] = timed(partial(select, q, k))
    for name, kernel in kernels.items():
        row[f"{name}_ms"] = timed(partial(kernel.attend, q, k, v, lists, PARAMS))
    fastest = kernels[min(kernels, key=lambda name: row[f"{name}_ms"])]
    row["total_ms"] = timed(partial(attend_selected, select, fastest, layer))
    found = fastest.attend(q, k, v, lists, PARAMS).float()
    row["error"] = round(float((found - exact).norm() / exact.norm()), 4)
    row["mass"] = round(covered(q, k, lists), 4)
    return row


@torch.no_grad()
def crossover(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Time whole attention, dense and sparse, from 4K to 32K tokens on planted data."""
    kernels = fast_kernels(args)
    for length in CROSSOVER:
        for data in args.data:
            layer = planted(length, PLANTED[data])
            row: dict[str, Any] = {"tokens": length, "data": data}
            row |= {name: timed(call) for name, call in dense_calls(*layer)}
            for label, select in selectors(args, first=2):
                for name, kernel in kernels.items():
                    try:
                        found: float | str = timed(partial(attend_selected, select, kernel, layer))
                    except Exception as failure:
                        found = f"{type(failure).__name__}: {failure}"[:80]
                    row[f"{label}, {name}"] = found
            yield said(row)


def fast_kernels(args: argparse.Namespace) -> dict[str, SparseBackend]:
    """Return the sparse backends worth timing here."""
    return {name: kernel for name, kernel in usable(args) if name in ("flash-attn-4", "triton")}


def attend_selected(select: Select, kernel: SparseBackend, layer: Layer) -> Tensor:
    """Select and attend, as a policy does."""
    q, k, v = layer
    return kernel.attend(q, k, v, select(q, k), PARAMS)


def covered(query: Tensor, key: Tensor, lists: BlockLists) -> float:
    """Return the mean share of true attention on selected blocks, over sampled queries."""
    length = query.shape[2]
    grid = BlockGrid(length, length, lists.block)
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randint(length, (SAMPLED_QUERIES,), generator=generator).to(query.device)
    position = torch.arange(length, device=query.device)
    mask = mask_from_lists(lists, grid.key_blocks)[0]
    shares = []
    group = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        logits = query[0, head, sampled].float() @ key[0, head // group].float().T * SCALING
        logits.masked_fill_(position > sampled[:, None], float("-inf"))
        listed = mask[head, sampled // lists.block][:, position // lists.block]
        shares.append((logits.softmax(-1) * listed).sum(-1).mean())
    return float(torch.stack(shares).mean())


def timed(call: Callable[[], Any]) -> float:
    """Return the median milliseconds of a call."""
    call()
    repeats = 1 if milliseconds(call, repeats=1, warm_up=0) > LONG_MS else 5
    times = [milliseconds(call, repeats=repeats, warm_up=0) for _ in range(3)]
    return round(statistics.median(times), 3)


def said(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as soon as it is known."""
    print(row, flush=True)
    return row
