"""Run the kernel over slots on small inputs and print how far it is from float64, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_slots.py` runs it. Every run calls the kernel twice with the same
counters, which have to be zero again after a call.
"""

import json
import os
import sys

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock.kernels import slots_triton
from kvdock.kernels.slots_triton import Tuning, attend
from kvdock.policy import AttentionParams

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"
PROCESSORS = 3
"""Pretended number of multiprocessors, so that small rows are split as long ones are."""


def oracle(query, key, value, valid, params):
    batch, heads, _, dim = query.shape
    group = heads // key.shape[1]
    scores = query.double().view(batch, -1, group, dim) @ key.double().transpose(2, 3)
    scores = scores * params.scaling
    if params.softcap is not None:
        scores = (scores / params.softcap).tanh() * params.softcap
    scores = scores.masked_fill(~valid[:, :, None], float("-inf"))
    if params.sinks is not None:
        sink = params.sinks.double().view(1, -1, group, 1).expand(batch, -1, -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value.double()).view(batch, 1, heads, -1)


def run(
    group=4, dim=64, slots=150, filled=(150, 70, 1), holes=True, ends=True, dtype=torch.float32,
    value_dim=None, softcap=None, sinks=False, tuning=None, kv_heads=2,
):  # fmt: skip
    """Return the largest error of two calls, or infinity if the counters are not zero again."""
    generator = torch.Generator().manual_seed(group * dim + slots)
    batch, heads = len(filled), group * kv_heads
    query = torch.randn(batch, 1, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    # a view of longer storage, as a cache's used part is
    key = torch.randn(batch, kv_heads, slots + 5, dim, generator=generator).to(dtype)
    value = torch.randn(batch, kv_heads, slots + 5, value_dim or dim, generator=generator).to(dtype)
    key, value = key[:, :, :slots], value[:, :, :slots]
    column = torch.arange(slots, dtype=torch.int32)
    valid = (column < torch.tensor(filled)[:, None, None]).expand(batch, kv_heads, slots).clone()
    if holes:
        gone = torch.rand(batch, kv_heads, slots, generator=generator) < 0.2
        gone[:, -1, 64:128] = True
        gone[..., 0] = False
        valid &= ~gone
    position = torch.where(valid, column, -1).int().to(DEVICE) if holes or not ends else None
    used = torch.tensor(filled, device=DEVICE) - 1 if ends else None
    sink = torch.randn(heads, generator=generator) if sinks else None
    params = AttentionParams(dim**-0.5 * 1.3, softcap, sink)
    exact = oracle(query, key, value, valid, params)
    on_device = AttentionParams(params.scaling, softcap, None if sink is None else sink.to(DEVICE))
    arrived = torch.zeros(batch * kv_heads, dtype=torch.int32, device=DEVICE)
    errors = []
    for _ in range(2):
        found = attend(
            query.to(DEVICE), key.to(DEVICE), value.to(DEVICE), on_device, arrived,
            position=position, used=used, tuning=tuning,
        )  # fmt: skip
        assert found.dtype == dtype and found.is_contiguous()
        errors.append((found.cpu().double() - exact).abs().max().item())
    return max(errors) if not arrived.any() else float("inf")


def runs():
    for group in (1, 3, 4, 8):
        yield f"group of {group}", run(group=group)
    for dim in (64, 96, 128):
        yield f"D={dim}", run(dim=dim)
    yield "values narrower than keys", run(dim=96, value_dim=64)
    yield "prefixes of unequal length", run(holes=False)
    yield "holes without ends", run(ends=False)
    yield "every slot filled", run(filled=(150, 150), holes=False)
    yield "one slot", run(slots=1, filled=(1,), holes=False)
    yield "a row without entries", run(filled=(0, 40), ends=False, holes=False)
    yield "one key/value head", run(kv_heads=1, filled=(77,))
    yield "many splits", run(slots=500, filled=(500, 300), tuning=Tuning(tile=16, share=64))
    yield "wide tile", run(slots=300, filled=(300, 200), tuning=Tuning(tile=128, share=64, warps=2))
    yield "softcap", run(softcap=1.5)
    yield "sinks", run(sinks=True)
    yield "softcap and sinks", run(softcap=1.5, sinks=True, filled=(150, 0), ends=False)
    yield "float16", run(dtype=torch.float16)
    yield "bfloat16", run(dtype=torch.bfloat16)


slots_triton.multiprocessors = lambda device: PROCESSORS
print(json.dumps(dict(runs())))
