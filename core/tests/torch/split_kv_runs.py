"""Run the merge kernel on small inputs and print how far it is from float64, as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_split_kv.py` runs it.
"""

import json
import os
import sys

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvdock.kernels.split_kv_triton import merge_splits

DEVICE = "cpu" if "--interpret" in sys.argv else "cuda"


def run(lead, splits, rows, dim, dtype, empty):
    """Return the largest errors of the output and of the log-sum-exp."""
    generator = torch.Generator().manual_seed(splits * 100 + rows)
    output = torch.randn(*lead, splits, rows, dim, generator=generator)
    lse = torch.randn(*lead, splits, rows, generator=generator) * 4
    if empty:
        lse[..., splits // 2 :, 0] = float("-inf")
        output[..., splits // 2 :, 0, :] = float("nan")
    found, total = merge_splits(output.to(DEVICE), lse.to(DEVICE), dtype)
    share = lse.double().softmax(dim=-2)[..., None]
    exact = (output.double() * share).where(share > 0, 0.0).sum(dim=-3)
    return {
        "output": (found.cpu().double() - exact).abs().max().item(),
        "lse": (total.cpu().double() - lse.double().logsumexp(dim=-2)).abs().max().item(),
    }


def runs():
    for splits in (1, 2, 5, 33):
        yield f"{splits} splits", run((2, 2), splits, 4, 64, torch.float32, splits > 1)
    for dim in (16, 80, 96, 128):
        yield f"D={dim}", run((3,), 3, 7, dim, torch.float32, False)
    yield "float16", run((2,), 4, 3, 64, torch.float16, True)
    yield "bfloat16", run((2,), 4, 3, 64, torch.bfloat16, False)


print(json.dumps(dict(runs())))
