"""What is checked of decode attention over slots before `slot_attention.py` times it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from measure import captured
from torch import Tensor

from kvdock.kernels import slots
from kvdock.kernels.decode import attend_slots, without_plans
from kvdock.kernels.slots_triton import Tuning, attend
from kvdock.policy import AttentionParams

HEADS, KV_HEADS, DIM = 32, 8, 128
PARAMS = AttentionParams(DIM**-0.5)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normal numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, device="cuda", dtype=dtype).normal_(generator=generator)


def difference(
    dtype: torch.dtype,
    dim: int,
    group: int,
    filled: tuple[int, ...],
    *,
    holes: bool,
    tuning: Tuning | None = None,
) -> float:
    """Return the largest error against float64, with rows that end at different slots."""
    batch, slots_, kv_heads = len(filled), max(filled) + 100, 2
    query = draw(batch, group * kv_heads, 1, dim, seed=1, dtype=dtype) * 2
    key = draw(batch, kv_heads, slots_, dim, seed=2, dtype=dtype)
    value = draw(batch, kv_heads, slots_, dim, seed=3, dtype=dtype)
    ends = torch.tensor(filled, device="cuda")
    column = torch.arange(slots_, device="cuda", dtype=torch.int32)
    position = torch.where(column < ends[:, None, None], column, -1).int()
    position = position.expand(batch, kv_heads, slots_).clone()
    if holes:
        position[:, 1, 1::7] = -1
    params = AttentionParams(dim**-0.5)
    arrived = slots.counters(batch, kv_heads, key.device)
    exact = attend_slots(query.double(), key.double(), value.double(), position >= 0, params)
    found = attend(
        query, key, value, params, arrived,
        position=position if holes else None, used=ends - 1, tuning=tuning,
    )  # fmt: skip
    return float((found.double() - exact).abs().max().nan_to_num(nan=math.inf))


def check(cuts: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Compare with float64, replay with moving ends, and look for races and unequal bits."""
    errors: dict[str, float] = {}
    for dtype, dim, group in [
        (torch.bfloat16, 128, 4), (torch.float16, 128, 8), (torch.float32, 128, 4),
        (torch.bfloat16, 64, 1), (torch.bfloat16, 96, 3), (torch.float32, 64, 3),
    ]:  # fmt: skip
        for holes in (False, True):
            name = f"{str(dtype)[6:]} D={dim} G={group} {'holes' if holes else 'prefix'}"
            filled = (4173, 1, 700, 2304)
            errors[name] = difference(dtype, dim, group, filled, holes=holes)
    for cut in cuts:
        errors[f"tuning {cut}"] = difference(
            torch.bfloat16, DIM, 4, (2304, 9), holes=False, tuning=Tuning(*cut, share=8)
        )
    bad = {k: v for k, v in errors.items() if v > (1e-5 if "float32" in k else 2e-2)}
    print(f"{len(errors)} cases, worst {max(errors.values()):.1e}, bad: {bad}", flush=True)
    found = {"errors": errors, "bad": bad, **replays()}
    print({name: value for name, value in found.items() if name != "errors"}, flush=True)
    return found


def replays() -> dict[str, Any]:
    """Move the ends between replays of one graph; compare with eager calls of the used part."""
    capacity, batch = 2560, 4
    query, key, value = (
        draw(batch, HEADS, 1, DIM, seed=1),
        *(draw(batch, KV_HEADS, capacity, DIM, seed=seed) for seed in (2, 3)),
    )
    used = torch.zeros(batch, dtype=torch.int64, device="cuda")
    arrived = slots.counters(batch, KV_HEADS, key.device)

    def run() -> Tensor:
        return attend(query, key, value, PARAMS, arrived, used=used)

    graph, output = captured(run)
    equal, close = True, 0.0
    for end in (2304, 2305, 2400, 2559, 1, 100):
        used.fill_(end - 1)
        graph.replay()
        eager = slots.attend_filled(query, key[:, :, :end], value[:, :, :end], PARAMS)
        with without_plans(query):
            torch_says = F.scaled_dot_product_attention(
                query, key[:, :, :end], value[:, :, :end], enable_gqa=True
            ).transpose(1, 2)
        close = max(close, (output - torch_says).abs().max().item())
        equal &= bool(torch.equal(output, eager)) or end < 2304  # cut alike near the capacity only
    used.fill_(2000)
    graph.replay()
    first, same = output.clone(), True
    for _ in range(2000):
        graph.replay()
        same &= bool(torch.equal(output, first))
    return {"captured equals eager": equal, "off torch": close, "2000 replays equal": same}
