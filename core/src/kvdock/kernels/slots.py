"""One decode step over slots whose number is fixed and whose use only the device knows.

Shapes: B rows, H query heads, K key/value heads, N physical slots, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvdock.kernels.decode import attend_slots
from kvdock.policy import AttentionParams

SMALL_CASE = (300, 250, 7)
"""Slots, and filled slots of two rows, of the case that a kernel is tried on."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

_log = logging.getLogger("kvdock")


def append_slots(
    table: dict[str, Tensor],
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    used: Tensor,
    released: Tensor | None,
    hole: Tensor | None,
) -> None:
    """Write one token per row behind its entries, or into the slot it gave up before.

    Args:
        table: "key", "value", "position" and a policy's per-entry tensors, [B, K, N, ...]; the
            latter start at zero.
        key, value: [B, K, 1, D]. tokens, used: int64 [B]: position and end of every row.
        released, hole: int64 [B, K] and bool [B]; None where rows never give a slot up.
    """
    batch, heads = key.shape[:2]
    kernel = append_kernel(key.device, key.dtype) if key.is_cuda else None
    if kernel is not None:
        kernel((table["key"], table["value"], table["position"]), key, value, tokens, used,
               released, hole)  # fmt: skip
        if len(table) == 3:
            return
    cursor = used[:, None].expand(batch, heads)
    if released is not None and hole is not None:
        cursor = torch.where(hole[:, None], released, cursor)
    position = tokens.to(torch.int32)[:, None, None].expand(batch, heads, 1)
    new = {"key": key, "value": value, "position": position}
    for name, tensor in table.items():
        source = new.get(name)
        if source is not None and kernel is not None:
            continue
        if source is None:
            source = tensor.new_zeros(batch, heads, 1, *tensor.shape[3:])
        index = cursor.view(batch, heads, 1, *[1] * (tensor.dim() - 3)).expand_as(source)
        tensor.scatter_(2, index, source)


def attend_filled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    position: Tensor | None = None,
    used: Tensor | None = None,
    arrived: Tensor | None = None,
    told: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend over the filled slots, by the kernel where it is usable and by a mask elsewhere.

    Args:
        query: [B, H, 1, D]. key, value: [B, K, N, D].
        position: int32 [B, K, N], −1 = empty; None where no slot below the end is empty.
        used: int64 [B]: nothing is filled beyond a row's first ``used + 1`` slots; None where the
            end is N.
        arrived: the kernel's counters from `counters`, owned by whoever may run at the same time
            as other calls; None takes those of the current stream.
        told: where the kernel writes logits and their log-sum-exps; only where it is usable.

    Returns:
        [B, 1, H, D], contiguous.
    """
    kernel = slot_kernel(
        query, key, value, Form(position is not None, used is not None, bool(told))
    )
    if kernel is not None:
        if arrived is None:
            arrived = _of_stream(query.device, key.shape[0] * key.shape[1])
        more = {} if told is None else {"told": told}
        return kernel(query, key, value, params, arrived, position=position, used=used, **more)
    assert told is None, "only the kernel tells its logits"
    valid = None if position is None else position >= 0
    if valid is None and used is not None:
        column = torch.arange(key.shape[2], device=key.device)
        valid = (column <= used[:, None, None]).expand(key.shape[:3])
    return attend_slots(query, key, value, valid, params)


def counters(batch: int, heads: int, device: torch.device) -> Tensor:
    """Return counters for calls that follow one another, int32 [B · K]."""
    return torch.zeros(batch * heads, dtype=torch.int32, device=device)


Kernel = Callable[..., Tensor]


class Form(NamedTuple):
    """Say which of its optional arguments a call of the kernel has; each form is compiled."""

    holes: bool = True
    ends: bool = True
    tells: bool = False


BOUNDED = Form()
"""The form of rows that give entries up."""


def slot_kernel(query: Tensor, key: Tensor, value: Tensor, form: Form) -> Kernel | None:
    """Return the kernel for states like these, None where plain torch has to do."""
    if not query.is_cuda:
        return None
    group = query.shape[1] // key.shape[1]
    return tried(query.device, query.dtype, group, key.shape[-1], value.shape[-1], form)


@cache
def tried(
    device: torch.device,
    dtype: torch.dtype,
    group: int,
    dim: int,
    value_dim: int,
    form: Form = BOUNDED,
) -> Kernel | None:
    """Return the kernel if it computes a small case rightly; None, with one log line, if not.

    Only the form that is asked for is compiled: a first use ever waits for its compiler.
    """
    try:
        from kvdock.kernels.slots_triton import attend

        error = _error(attend, device, dtype, group, dim, value_dim, form)
        limit = TOLERANCE.get(dtype, 0.0)
        if error < limit:
            return attend
        reason = f"a small case differs by {error:.1e}, expected below {limit:.0e}"
    except Exception as failure:  # Triton not installed, or no compiler, or not for this chip
        reason = f"{type(failure).__name__}: {failure}"
    _log.warning("decode attends through masks, several times slower: %s", reason)
    return None


def _error(
    attend: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    group: int,
    dim: int,
    value_dim: int,
    form: Form = BOUNDED,
) -> float:
    """Return the largest difference from plain torch, over rows of unequal length with holes."""
    generator, heads = torch.Generator().manual_seed(0), 2
    slots, *filled = SMALL_CASE
    if not form.holes and not form.ends:
        filled = [slots] * len(filled)

    def states(count: int, length: int, width: int) -> Tensor:
        made = torch.randn(len(filled), count, length, width, generator=generator)
        return made.to(device, dtype)

    query = states(group * heads, 1, dim)
    key, value = states(heads, slots, dim), states(heads, slots, value_dim)
    position = torch.arange(slots, dtype=torch.int32).repeat(len(filled), heads, 1)
    for row, count in enumerate(filled):
        position[row, :, count:] = -1
        if form.holes:
            position[row, 1, 3] = -1
    position = position.to(device)
    used = torch.tensor(filled, device=device) - 1
    params = AttentionParams(dim**-0.5)
    arrived = counters(len(filled), heads, device)
    exact = attend_slots(query.double(), key.double(), value.double(), position >= 0, params)
    given: dict[str, Any] = {"position": position if form.holes else None}
    given["used"] = used if form.ends else None
    if form.tells:
        given["told"] = tuple(query.new_empty(len(filled), group * heads, *size).float()
                              for size in ((slots,), ()))  # fmt: skip
    # the second finds the counters as the first left them
    found = [attend(query, key, value, params, arrived, **given) for _ in range(2)]
    error = (torch.stack(found).double() - exact).abs().max()
    if form.tells:
        logits, total = (part.double() for part in given["told"])
        weights = (logits - total[..., None]).exp2().unflatten(1, (heads, group))
        weights = weights.where(position[:, :, None] >= 0, 0.0)
        again = (weights @ value.double()).flatten(1, 2)[:, None]
        error = error.maximum((again - exact).abs().max())
    return float(error.nan_to_num(nan=float("inf")))


@cache
def append_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., None] | None:
    """Return the kernel that appends a token if it writes a small case rightly, else None."""
    try:
        from kvdock.kernels.step_triton import append

        right = _appends(append, device, dtype)
    except Exception as failure:
        _log.info("decode appends by scatters: %s: %s", type(failure).__name__, failure)
        return None
    if not right:
        _log.warning("decode appends by scatters: the kernel got a small case wrong")
    return append if right else None


def _appends(append: Callable[..., None], device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a kernel writes what the scatters write, with and without slots given up."""
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    widths = {"key": (24,), "value": (16,), "position": ()}
    key, value = (torch.randn(3, 2, 1, n, generator=generator).to(dtype) for n in (24, 16))
    tokens, used = torch.tensor([70, 80, 90]), torch.tensor([4, 0, 2])
    given_up = torch.tensor([[1, 2], [0, 0], [1, 0]]), torch.tensor([True, False, True])
    for released, hole in ((None, None), given_up):
        arguments = (key, value, tokens, used, released, hole)
        tables = []
        for place in (cpu, device):
            table = {
                name: torch.full((3, 2, 5, *width), -1, dtype=dtype if width else torch.int32)
                for name, width in widths.items()
            }
            table = {name: tensor.to(place) for name, tensor in table.items()}
            moved = [None if x is None else x.to(place) for x in arguments]
            if place is cpu:
                append_slots(table, *moved)  # type: ignore[arg-type]
            else:
                append(tuple(table.values()), *moved)
            tables.append(table)
        if not all(torch.equal(tables[0][name], tables[1][name].cpu()) for name in widths):
            return False
    return True


_streams: dict[tuple[torch.device, int], Tensor] = {}


def _of_stream(device: torch.device, pairs: int) -> Tensor:
    """Return the counters of the current stream, whose calls follow one another."""
    place = device, int(torch.cuda.current_stream(device).cuda_stream)
    held = _streams.get(place)
    if held is None or held.numel() < pairs:
        held = torch.zeros(max(pairs, 1024), dtype=torch.int32, device=device)
        _streams[place] = held
    return held
